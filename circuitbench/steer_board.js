// Rows of directions over a model's text: `render` is what anywidget calls, `show` what a saved page does. No build step.

const CSS = `
.steer [hidden]{display:none!important} .steer :is(button,select,input:not([type=range],[type=checkbox])){font:inherit;font-size:13px;
padding:.2rem .5rem;border:1px solid var(--soft);border-radius:6px;color:inherit;background:var(--back);min-width:0;max-width:100%;box-sizing:border-box}
.steer button{cursor:pointer} .steer :is(button,select,input):disabled{cursor:not-allowed;opacity:.75}
.steer .bar{display:flex;flex-wrap:wrap;gap:.4rem 1rem;align-items:center;font-size:13px;margin-bottom:.3rem} .steer .bar .end{margin-left:auto}
.steer .bar input{width:4.6em} .steer label{display:inline-flex;align-items:center;gap:.35em;color:var(--soft);font-size:13px}
.steer .row{display:grid;grid-template-columns:minmax(9rem,1.2fr) minmax(14rem,2fr) 21.5rem;gap:.2rem 1.2rem;align-items:center;
border-top:1px solid var(--line);padding:.45rem 0 .45rem .6rem;border-left:4px solid var(--c)} .steer .rows{border-bottom:1px solid var(--line);margin-bottom:.7rem}
.steer .row.idle{border-left-color:var(--line)} .steer .who{display:flex;gap:.5rem;align-items:baseline;min-width:0}
.steer .who input{accent-color:var(--c);margin:0;align-self:start;margin-top:.25em;flex:none} .steer .who b{display:block;color:var(--ink);font-weight:600;overflow-wrap:anywhere}
.steer .who small{display:block;font-size:12px;color:var(--soft);overflow-wrap:anywhere}
.steer .how{display:flex;gap:.5rem;align-items:center} .steer .how>div{flex:1;min-width:5rem} .steer .how input[type=range]{display:block;width:100%;margin:0;accent-color:var(--c)}
.steer .ends{display:flex;justify-content:space-between;font-size:11px;line-height:1.1;color:var(--soft)} .steer .how input[type=number]{width:5.2em} .steer .how label{white-space:nowrap} .steer .set select{max-width:13rem}
.steer .set{display:flex;flex-wrap:wrap;gap:.3rem .6rem;align-items:center} .steer .said{grid-column:1/-1;font-size:12px;color:var(--soft);padding-left:1.4rem;overflow-wrap:anywhere}
.steer h3{font:inherit;font-weight:600;margin:.2rem 0;padding:0} .steer .strip{max-height:11em;overflow-y:auto;line-height:2.1;padding:3px}
.steer .strip button{padding:0 .2em;margin:1px;border-radius:3px;border:1px solid var(--line);white-space:pre;line-height:1.5;font-size:14px;cursor:pointer}
.steer .strip button:disabled{opacity:1;cursor:default} .steer .strip button[aria-pressed=true]{outline:2px solid var(--c);outline-offset:0;border-color:var(--c);font-weight:600}
.steer .strip .later{margin-left:.6em;font-style:italic} .steer .strip i{display:inline-block;width:.5em;height:.5em;border-radius:50%;background:var(--c);margin-left:.15em;vertical-align:.45em}
.steer .texts{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;margin-top:.7rem} .steer .texts>div{flex:1 1 17rem;min-width:0} .steer .texts .tk{min-height:5.7em;font-size:15px}
.steer .tk{white-space:pre-wrap} .cbv.steer .tk :is(span,mark){display:inline;padding:0 0 1px;margin:0;box-shadow:none;border-radius:0} .steer .tk mark{border-bottom:0}
.steer .numbers{display:flex;flex-wrap:wrap;gap:.2rem 1.6rem;margin:.4rem 0;color:var(--soft)} .steer .numbers b{color:var(--ink)}
.steer .tabs{display:flex;flex-wrap:wrap;gap:.3rem;margin-top:1rem;border-bottom:1px solid var(--line)} .steer .tabs button{border-bottom:0;border-radius:6px 6px 0 0}
.steer .tabs button[aria-selected=true]{background:var(--ink);color:var(--back);border-color:var(--ink)} .steer .pane{padding:.6rem 0;min-height:7rem}
.steer pre{margin:.4rem 0;padding:.6rem .8rem;border:1px solid var(--line);border-radius:6px;overflow-x:auto;font:13px/1.45 ui-monospace,monospace;background:none;color:var(--ink)}
.steer .busy::before{content:'';display:inline-block;width:.6em;height:.6em;border-radius:50%;background:var(--s1);margin-right:.4em}
.steer .er{margin:.4rem 0;white-space:pre-wrap;overflow-wrap:anywhere} .steer.slim .row{grid-template-columns:minmax(0,1fr)} .steer.slim .said{padding:0}`

const HTML = `<div class="bar"><span class="model"></span><label>tokens to write <input class="new" type="number" min="1"></label>
<button class="stop" type="button">Stop</button><span class="busy" role="status"></span><span class="still-note note end" hidden>Saved page: the controls stand still without a kernel.</span></div>
<div class="er" role="alert" hidden></div><div class="rows"></div>
<div class="bar"><h3>Prompt</h3><label class="for">tokens of <select class="which"></select></label><span class="note hint"></span></div><div class="strip" role="group" aria-label="Tokens of the prompt"></div>
<div class="texts"><div><h3>Clean</h3><div class="tk clean" tabindex="0" role="group" aria-label="Clean text"></div></div><div><h3>Steered</h3><div class="tk steered" tabindex="0" role="group" aria-label="Steered text"></div></div></div>
<div class="numbers"></div><div class="legend"></div>
<div class="tabs" role="tablist"><button type="button" role="tab" data-tab="dose">Dose-response</button><button type="button" role="tab" data-tab="persist">Persistence</button>
<button type="button" role="tab" data-tab="code">Copy as code</button></div>
<div class="pane" role="tabpanel" tabindex="0"><div class="bar ask"><label>of <select class="of"></select></label><button type="button" class="go"></button></div>
<div class="note stale" hidden>Measured with earlier settings.</div><div class="chart"></div><div class="code"><button type="button" class="copy">Copy</button> <span class="note copied" role="status" style="display:inline"></span><pre tabindex="0"></pre></div></div>`

const KINDS = {push: 'push at every token', chosen: 'push at chosen tokens', write: 'write once', ablate: 'ablate'}
const WAIT = 250                                              // milliseconds in which moves are gathered
const SAID = 12                                               // tokens that are named
const late = r => r.later && r.kind == 'chosen'
const picks = r => r.kind == 'chosen' || r.kind == 'write'
const shown = s => s.replace(/^ +| +$/g, a => '·'.repeat(a.length)).replace(/\n/g, '⏎').replace(/\t/g, '⇥') || '∅'
const element = (tag, text, more) => Object.assign(document.createElement(tag), {textContent: text}, more)
const option = (value, text) => element('option', text, {value})
const short = x => String(+(+x).toPrecision(4))

// state: about, settings, result, charts, code, error, busy; tell: is given a message, or null where nobody hears it.
export function mount(root, state, tell) {
  root.innerHTML = `<style>${CSS}</style><div class="cbv steer" data-lm-suppress-shortcuts="true">${HTML}</div>`
  const box = root.querySelector('.steer'), $ = s => box.querySelector(s), about = state.about
  let {rows, new: n} = structuredClone(state.settings), due = 0, which = -1, tab = 'dose', lines = []
  const last = about.tokens.length - 1, colour = k => `var(--s${k % 6})`
  const later = () => { if (!tell) return; clearTimeout(due); due = setTimeout(() => { due = 0; tell({do: 'set', rows, new: n}) }, WAIT) }
  function change(k, more) {
    Object.assign(rows[k], more)
    const r = rows[k]
    if ('kind' in more && picks(r)) { which = k
      if (r.kind == 'write') r.at = r.at.filter(t => t <= last).slice(-1)
      if (!r.at.length && !(r.later && r.kind == 'chosen')) r.at = [last] }
    sync(); later()
  }

  box.addEventListener('focusin', e => { e.target.dataset.lmSuppressShortcuts = true })   // JupyterLab looks at the focused one first

  // -- the rows
  function build() {
    lines = about.directions.map((d, k) => {
      const id = `${Math.random().toString(36).slice(2)}`, row = element('div', '', {className: 'row'}), name = d.name
      row.style.setProperty('--c', colour(k))
      row.innerHTML = `<label class="who"><input type="checkbox"><span><b></b><small></small></span></label>
<div class="how"><div><input type="range"><div class="ends" aria-hidden="true"><span></span><span>0</span><span></span></div></div><label><input type="number" step="any"> × length</label></div>
<div class="set"><select class="kind"></select><label class="l">layer <select></select></label><label class="h">head <select></select></label></div><div class="said"></div>`
      const q = s => row.querySelector(s), [slide, number] = [q('[type=range]'), q('[type=number]')], on = q('[type=checkbox]')
      q('b').textContent = name; on.setAttribute('aria-label', `${name} on`)
      q('small').textContent = `${d.source == name ? '' : d.source + ' at '}${d.site}${d.own ? ', ' + d.own : ''}; length ${short(d.norm)}`
      slide.setAttribute('aria-label', `strength of ${name}`); number.setAttribute('aria-label', `strength of ${name}, as a number`)
      number.title = 'Strength, in units of the direction’s own length'
      for (const x of d.kinds) q('.kind').append(option(x, KINDS[x]))
      q('.kind').setAttribute('aria-label', `what ${name} does`)
      for (const l of d.layers) q('.l select').append(option(l, l == d.layer ? `${l} (own)` : l))
      q('.h select').append(option('', d.own || 'own'), ...d.heads.map(h => option(h, h)))
      q('.l').hidden = d.layers.length < 2; q('.h').hidden = !d.heads.length
      on.onchange = () => change(k, {on: on.checked})
      slide.oninput = () => change(k, {strength: +slide.value})
      slide.ondblclick = () => change(k, {strength: 0})
      number.oninput = () => { if (number.value !== '' && isFinite(number.value)) change(k, {strength: +number.value}) }
      number.onblur = sync
      q('.kind').onchange = e => change(k, {kind: e.target.value})
      q('.l select').onchange = e => change(k, {layer: +e.target.value == d.layer ? null : +e.target.value})
      q('.h select').onchange = e => change(k, {head: e.target.value === '' ? null : +e.target.value})
      $('.rows').append(row)
      $('.which').append(option(k, name)); $('.of').append(option(k, name))
      return {row, q, slide, number, on}
    })
    about.tokens.forEach((s, t) => { const b = element('button', '', {type: 'button', title: `${t}: ${JSON.stringify(s)}`, onclick: () => pick(t)})
      $('.strip').append(b) })
    $('.strip').append(element('button', 'every written token', {type: 'button', className: 'later', title: 'Every token that is written after the prompt',
      onclick: () => change(which, {later: !rows[which].later})}))
    $('.new').max = about.most; $('.model').textContent = about.model
    if (!tell) for (const e of box.querySelectorAll('.bar input,.rows :is(input,select),.which,.strip button,.go')) e.disabled = true
    $('.still-note').hidden = !!tell; $('.stop').hidden = !tell
  }
  function pick(t) {
    if (which < 0) return
    const at = rows[which].at
    change(which, {at: rows[which].kind == 'write' ? [t] : at.includes(t) ? at.filter(p => p != t) : [...at, t].sort((a, b) => a - b)})
  }
  const idle = r => !r.on ? 'off' : r.kind != 'ablate' && !r.strength ? 'at strength 0: does nothing' : picks(r) && !r.at.length && !late(r) ? 'no token is chosen: does nothing' : ''
  const named = r => [...r.at.slice(0, SAID).map(t => t > last ? `${t}, after the prompt` : `${t} ${JSON.stringify(about.tokens[t])}`),
    ...r.at.length > SAID ? [`${r.at.length - SAID} more`] : [], ...late(r) ? ['every token that is written'] : []]
  const words = r => idle(r) || (picks(r) ? `at ${named(r).join(', ')}` : '')
  const typed = (e, v) => { if (e != e.getRootNode().activeElement) e.value = v }   // what is being typed stays
  function sync() {                                           // what the settings say, into the controls
    lines.forEach(({row, q, slide, number, on}, k) => {
      const r = rows[k], d = about.directions[k], reach = Math.max(d.reach, Math.abs(r.strength)), ends = q('.ends').children
      on.checked = r.on; row.classList.toggle('idle', !!idle(r))
      slide.min = -reach; slide.max = reach; slide.step = +(d.reach / 40).toPrecision(2); slide.value = r.strength
      typed(number, +r.strength.toPrecision(6))
      slide.setAttribute('aria-valuetext', `${short(r.strength)} lengths`)
      ends[0].textContent = `−${short(reach)}`; ends[2].textContent = `+${short(reach)}`
      slide.disabled = number.disabled = !tell || r.kind == 'ablate'
      q('.kind').value = r.kind; q('.l select').value = r.layer ?? d.layer; q('.h select').value = r.head ?? ''
      q('.said').textContent = words(r); q('.said').hidden = !words(r)
    })
    typed($('.new'), n)
    const able = rows.map((r, k) => picks(r) ? k : -1).filter(k => k >= 0)
    if (!able.includes(which)) which = able[0] ?? -1
    for (const o of $('.which').options) o.hidden = o.disabled = !able.includes(+o.value)
    $('.for').hidden = which < 0; if (which >= 0) $('.which').value = which
    $('.hint').textContent = !tell ? '' : which < 0 ? 'Every token is pushed. Tokens can be picked for “push at chosen tokens” and “write once”.'
      : rows[which].kind == 'write' ? 'Pick the token after which is written.' : 'Pick the tokens that are pushed.'
    $('.strip').style.setProperty('--c', colour(Math.max(0, which)));
    [...$('.strip').children].forEach((b, t) => {
      const after = t > last, has = r => after ? late(r) : r.at.includes(t)
      b.replaceChildren(after ? 'every written token' : shown(about.tokens[t]), ...able.filter(k => has(rows[k]) && rows[k].on).map(k => {
        const dot = element('i', ''); dot.style.setProperty('--c', colour(k)); return dot }))
      b.setAttribute('aria-pressed', which >= 0 && has(rows[which])); b.disabled = !tell || which < 0
      if (after) b.hidden = !rows.some(r => r.kind == 'chosen') || which >= 0 && rows[which].kind != 'chosen'
    })
  }

  // -- what was written and measured
  function texts(result) {
    const show = result.show || {}
    for (const k of ['clean', 'steered', 'legend', 'numbers']) $('.' + k).innerHTML = show[k] || ''
    box.dataset.written = result.steered?.length || 0
  }
  function report() {
    $('.busy').textContent = state.busy; $('.busy').hidden = !state.busy; $('.stop').disabled = !state.busy
    $('.er').textContent = state.error; $('.er').hidden = !state.error; box.dataset.busy = state.busy || ''
  }
  const states = () => about.directions.map((d, k) => d.state ? k : -1).filter(k => k >= 0)
  function pane() {
    for (const b of box.querySelectorAll('.tabs button')) { b.setAttribute('aria-selected', b.dataset.tab == tab); b.tabIndex = b.dataset.tab == tab ? 0 : -1 }
    const chart = state.charts[tab], some = tab == 'persist' ? states() : about.directions.map((_, k) => k)
    $('.ask').hidden = tab == 'code' || !some.length || !tell; $('.code').hidden = tab != 'code'; $('.stale').hidden = !chart?.stale
    for (const o of $('.of').options) o.hidden = o.disabled = !some.includes(+o.value)
    if (some.length && !some.includes(+$('.of').value)) $('.of').value = some[0]
    $('.go').textContent = tab == 'dose' ? 'Measure' : 'Compute'
    if (chart) $('.chart').innerHTML = chart.html
    else $('.chart').replaceChildren(tab == 'code' ? '' : element('p', !tell ? 'Not measured.' : tab == 'dose' ? 'Runs the text under a handful of strengths, the other rows as they are.'
      : some.length ? 'How much of a write into a state the decays of the clean run leave after each later token.' : 'For writes into a state; none of these directions is one.', {className: 'note'}))
    $('pre').textContent = state.code
  }

  // -- listening
  build(); sync(); texts(state.result); report(); pane()
  $('.new').oninput = e => { const v = Math.round(+e.target.value); if (v >= 1 && v <= about.most && v != n) { n = v; later() } }
  $('.new').onblur = sync
  $('.which').onchange = e => { which = +e.target.value; sync() }
  $('.stop').onclick = () => { clearTimeout(due); due = 0; tell({do: 'stop'}) }
  $('.go').onclick = () => tell({do: tab, name: about.directions[$('.of').value].name})
  $('.tabs').onclick = e => { if (e.target.dataset.tab) { tab = e.target.dataset.tab; pane() } }
  $('.tabs').onkeydown = e => { const all = [...$('.tabs').children], way = {ArrowRight: 1, ArrowLeft: -1}[e.key]
    if (!way) return
    const b = all[(all.findIndex(b => b.dataset.tab == tab) + way + all.length) % all.length]
    tab = b.dataset.tab; pane(); b.focus(); e.preventDefault() }
  $('.copy').onclick = async () => {
    try { await navigator.clipboard.writeText(state.code); $('.copied').textContent = 'Copied.' }
    catch { getSelection().selectAllChildren($('pre')); $('.copied').textContent = 'The browser does not let pages copy here; it is selected.' } }
  const look = new ResizeObserver(() => box.classList.toggle('slim', box.clientWidth < 860))
  look.observe(box)
  return {
    set(more) {                                               // what the kernel says
      Object.assign(state, more)
      if ('settings' in more && !due) { ({rows, new: n} = structuredClone(state.settings)); sync() }
      if ('result' in more) texts(state.result)
      if ('error' in more || 'busy' in more) { if (state.error) texts(state.result); report() }
      if ('charts' in more || 'code' in more) { $('.copied').textContent = ''; pane() } },
    live: texts,
    stop() { clearTimeout(due); look.disconnect() }
  }
}

// From the page of `SteerInspector.to_html`.
export function show() {
  const state = JSON.parse(document.getElementById('steer-state').textContent)
  return mount(document.getElementById('steer'), {error: '', busy: '', ...state}, null)
}

export default {
  render({model, el}) {
    const names = ['about', 'settings', 'result', 'charts', 'code', 'error', 'busy']
    const view = mount(el, Object.fromEntries(names.map(k => [k, model.get(k)])), message => model.send(message))
    const heard = names.slice(1).map(k => [`change:${k}`, () => view.set({[k]: model.get(k)})])
    const live = message => { if (message.live) view.live(message.live) }
    for (const [k, f] of heard) model.on(k, f)
    model.on('msg:custom', live)
    return () => { for (const [k, f] of heard) model.off(k, f); model.off('msg:custom', live); view.stop() }
  }
}
