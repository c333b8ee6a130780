"""How long the board of a circuit takes from a move of its slider to the picture, in Chromium, by edges drawn.

    python bench/board.py [--model tiny://mamba2] [--json OUT]

The circuit is that of one fact with the ports of every head told apart by lag. Medians of a dozen moves: *move* is from
the input event to the frame that shows it, *drawing* is the board's own part of it.
"""
import shutil
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright
from timing import options, table

from circuitbench import extract_circuit, load_model
from circuitbench.board import CircuitInspector
from circuitbench.graph import model_graph

MOVES = """async sizes => {
  const e = document.querySelector('.count'), box = document.querySelector('.board'), all = [], own = []
  for (const n of sizes) { const t = performance.now(), was = box.dataset.frames
    e.value = n; e.dispatchEvent(new Event('input'))
    while (box.dataset.frames == was) await new Promise(requestAnimationFrame)
    await new Promise(f => { const c = new MessageChannel(); c.port1.onmessage = f; c.port2.postMessage(0) })
    all.push(performance.now() - t); own.push(+box.dataset.ms) }
  const mid = v => v.sort((a, b) => a - b)[v.length >> 1]
  return [mid(all), mid(own), +box.dataset.edges] }"""


def main(o):
    model = load_model(o.model)
    prompt = 'Question: what is the capital of France? Answer:'
    found = extract_circuit(model, prompt, target=' Paris', graph=model_graph(model, lags=True), progress=False)
    rows, sizes = [], [300] if o.quick else [300, 1000, 2000, 4000]
    with tempfile.TemporaryDirectory() as tmp, sync_playwright() as p:
        path = CircuitInspector(found.to_dict()).to_html(Path(tmp)/'board.html')
        size = path.stat().st_size
        browser = p.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox', '--disable-gpu'])
        page = browser.new_page(viewport={'width': 1300, 'height': 900})
        page.goto(path.as_uri())
        page.locator('.board[data-frames]').wait_for()
        for n in sizes:
            move, own, drawn = page.evaluate(MOVES, [n + k for k in range(12)])
            rows.append(dict(kept=n, drawn=drawn, move_ms=move, drawing_ms=own))
        browser.close()
    table(rows, o, f'{o.model}, {len(found.graph.edges)} edges, page of {size/1e3:.0f} kB')


if __name__ == '__main__':
    main(options(__doc__.splitlines()[0], model=('tiny://mamba2', 'whose circuit is drawn')))
