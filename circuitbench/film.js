// Plays a film of states: `render` is what anywidget calls, `films` what a page of its own does. No build step.

const CSS = `
.film [hidden]{display:none!important} .film{outline-offset:4px} .film .bar{display:flex;flex-wrap:wrap;gap:.5rem 1rem;align-items:center;
margin-bottom:.5rem}
.film button,.film select{font:inherit;font-size:13px;padding:.2rem .6rem;border:1px solid var(--soft);border-radius:6px;
color:inherit;background:var(--back)} .film button{min-width:5.2em;cursor:pointer}
.film label{font-size:13px;color:var(--soft)} .film .step{flex:1 1 12rem;min-width:8rem;accent-color:var(--s0)}
.film .now{flex:0 0 19em;font-weight:600;white-space:pre;overflow:hidden;text-overflow:ellipsis}
.film .tk{max-height:7.8em;overflow-y:auto;padding:3px;position:relative}
.film .tk span{cursor:pointer;background:var(--l);color:var(--li)}
.film .panels{display:flex;flex-wrap:wrap;gap:.4rem 1.6rem;align-items:flex-start} .film h3{font:inherit;font-weight:600;
margin:.7rem 0 .3rem;padding:0;white-space:nowrap;overflow:hidden;text-overflow:ellipsis} .film .panels .note{margin-top:.2rem}
.film .panels .lg b{width:5em} .film canvas{display:block;max-width:100%} .film canvas[data-click]{cursor:pointer}
.film output{min-height:1.5em;white-space:pre-wrap} .film .lg{margin:.3rem 0 0} 
.film .roll{max-height:27rem;overflow-y:auto}`

const HTML = `<div class="bar"><button type="button"></button><input class="step" type="range" min="0" step="1">
<span class="now"></span></div><div class="bar"><label>layer <select class="layer"></select></label><label>speed <select class="speed">
<option value="3">3 a second</option><option value="10" selected>10 a second</option><option value="30">30 a second</option>
<option value="1000">every frame</option></select></label><label>colours <select class="own"><option value="">one scale
</option><option value="1">a scale for each head</option></select></label></div>
<div class="tk" role="img" aria-label="Tokens"></div><div class="lg tokens"></div>
<div class="panels"><div><h3 class="a"></h3><canvas class="grid" role="img" aria-label="State of each head" data-click></canvas></div>
<div><h3 class="b"></h3><canvas class="one" role="img" aria-label="State of the chosen head"></canvas><div class="note"></div><div class="lg of-states"></div></div>
<div><h3 class="c"></h3><canvas class="wrote" role="img" aria-label="What the chosen head writes"></canvas><div class="note"></div><div class="lg of-writes"></div></div></div>
<output class="cells"></output>
<h3>What each head keeps, writes and would say</h3><div class="roll"><canvas class="rows" role="img" aria-label="What each head keeps, writes and would say" data-click></canvas></div><output class="said"></output>
<details><summary>Values of this step as a table</summary><div class="sc" tabindex="0" role="group" aria-label="Every head"></div>
</details><div class="patches"><h3 class="d"></h3><canvas class="map" role="img" aria-label="Recovery by head and step" data-click></canvas><div class="lg of-map"></div>
<output class="patched"></output></div>`

// -- reading -----------------------------------------------------------------------------
const KINDS = {F16: Uint16Array, F32: Float32Array, F64: Float64Array, I32: Int32Array, BOOL: Uint8Array}
let halves                                                     // what each of the 65,536 half-precision codes is

function read(data) {
  if (!halves) halves = Float32Array.from({length: 65536}, (_, u) => {
    const e = u >> 10 & 31, m = u & 1023
    return (u >> 15 ? -1 : 1) * (e > 30 ? (m ? NaN : Infinity) : e ? 2 ** (e - 15) * (1 + m / 1024) : m * 2 ** -24) })
  const bytes = new Uint8Array(data.buffer, data.byteOffset, data.byteLength).slice()     // begins at a whole word
  const size = Number(new DataView(bytes.buffer).getBigUint64(0, true))
  const {__metadata__, ...parts} = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + size)))
  const film = JSON.parse(__metadata__.circuitbench)
  for (const [name, {dtype, shape, data_offsets: [lo, hi]}] of Object.entries(parts)) {
    const kind = KINDS[dtype], v = new kind(bytes.buffer, 8 + size + lo, (hi - lo) / kind.BYTES_PER_ELEMENT)
    if (name.startsWith('patches.')) film.patches[name.slice(8)] = v
    else film[name] = Object.assign(v, {dims: shape})
  }
  return film
}

// -- words -------------------------------------------------------------------------------
const num = x => Number.isInteger(x) ? x.toLocaleString('en') : !isFinite(x) ? String(x).replace('Infinity', '∞')
  : Math.abs(x) >= 1e6 || Math.abs(x) < 1e-4 ? x.toExponential(2) : Math.abs(x) >= 1000 ? Math.round(x).toLocaleString('en')
  : String(+x.toPrecision(3))
const shown = s => s.replace(/[ \n\t\r]/g, c => ({' ': '·', '\n': '⏎', '\t': '⇥', '\r': '␍'})[c]) || '∅'
const element = (tag, text, more) => Object.assign(document.createElement(tag), {textContent: text}, more)

// -- the player --------------------------------------------------------------------------
// start: {layer, step, head}, as the film names them; tell: is given the same after a choice.
export function mount(root, data, ramps, start, tell = () => {}) {
  const film = read(data), [L, T, H, R, C] = film.states.dims, [P, N] = film.shape
  const rowName = film.heads[0] == 'all' ? 'channel' : 'd_head'
  root.innerHTML = `<style>${CSS}</style><div class="cbv film" tabindex="0" role="group" aria-label="States, step by step"
data-lm-suppress-shortcuts="true">${HTML}<i style="display:none;color:light-dark(#000,#fff)"></i></div>`
  const box = root.querySelector('.film'), $ = s => box.querySelector(s), probe = box.lastElementChild
  const at = {l: 0, t: 0, h: 0}, lut = [0, 1, 2, 3].map(k => new Uint32Array(
    Array.from({length: 256}, (_, i) => (ramps[768 * k + 3 * i] | ramps[768 * k + 3 * i + 1] << 8
                                         | ramps[768 * k + 3 * i + 2] << 16 | 255 << 24) >>> 0)))
  const css = (k, i) => '#' + [0, 1, 2].map(c => ramps[768 * k + 3 * i + c].toString(16).padStart(2, '0')).join('')
  const both = (signed, i) => `light-dark(${css(2 * !signed, i)},${css(2 * !signed + 1, i)})`
  const ink = (k, i) => { const [r, g, b] = [0, 1, 2].map(c => { const x = ramps[768 * k + 3 * i + c] / 255
    return x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4 }); return .2126 * r + .7152 * g + .0722 * b < .179 ? '#fff' : '#000' }
  const place = (x, lo, hi) => isNaN(x) ? 0 : 1 + Math.round(254 * Math.min(1, Math.max(0, (x - lo) / (hi - lo))))
  const small = document.createElement('canvas'), paint = small.getContext('2d')
  box.addEventListener('focusin', e => { e.target.dataset.lmSuppressShortcuts = true })   // JupyterLab looks at the focused one first
  let own = false, dark = false, playing = null, due = 0, frames = 0, colours = {}

  // what the film says
  const lth = (l, t, h) => (l * T + t) * H + h
  const limit = (l, h) => (own ? film.state_limit[l * H + h] : Math.max(...film.state_limit.subarray(l * H, l * H + H))) || 1
  const cell = (l, t, h, i, j) => halves[film.states[(lth(l, t, h) * R + i) * C + j]] * film.state_scale[l * H + h]
  const write = (l, t, h, i, j) => halves[film.values[lth(l, t, h) * R + i]] * halves[film.keys[lth(l, t, h) * C + j]]
    * film.write_scale[l * H + h]
  const part = (i, n, m) => [Math.floor(i * n / m), Math.floor((i + 1) * n / m) - 1]
  const where = (name, i, n, m) => { const [a, b] = part(i, n, m); return a == b ? `${name} ${a}` : `${name} ${a}–${b}` }
  const block = (i, j) => `${where(rowName, i, P, R)}, ${where('d_state', j, N, C)}`
  const pooled = P > R || N > C ? {mean: ' (mean of the block)', largest: ' (largest of the block)'}[film.pool] : ''
  const range = (a, b) => a < b ? ` (${num(a)} to ${num(b)})` : ''
  const horizon = h => { const k = 3 * (at.l * H + h); return num(film.horizon[k]) + range(film.horizon[k + 1], film.horizon[k + 2]) }
  const keeps = h => { const k = 3 * lth(at.l, at.t, h); return num(film.decay[k]) + range(film.decay[k + 1], film.decay[k + 2]) }
  const says = h => { if (!film.said) return []; const n = film.said.dims[3], k = lth(at.l, at.t, h) * n
    return Array.from({length: n}, (_, i) => [film.words[film.said[k + i]], film.logits[k + i]]) }
  const head = h => film.heads[h] == 'all' ? 'all channels' : `head ${film.heads[h]}`

  // the size of a write's picture over all steps, and of a layer's write norms
  const highest = () => { let top = 0
    for (let t = 0; t < T; t++) { let a = 0, b = 0
      for (let i = 0; i < R; i++) a = Math.max(a, Math.abs(halves[film.values[lth(at.l, t, at.h) * R + i]]))
      for (let j = 0; j < C; j++) b = Math.max(b, Math.abs(halves[film.keys[lth(at.l, t, at.h) * C + j]]))
      top = Math.max(top, a * b) }
    return top * film.write_scale[at.l * H + at.h] || 1 }
  const strongest = () => { let top = 0
    for (let k = at.l * T * H; k < (at.l + 1) * T * H; k++) top = Math.max(top, film.write_norms[k]); return top || 1 }
  let writeTop = 1, normTop = 1, patchTop = 1

  // -- drawing
  function canvas(c, w, h) {
    const d = devicePixelRatio || 1, W = Math.round(w * d), Hh = Math.round(h * d)
    if (c.width != W || c.height != Hh) { c.width = W; c.height = Hh; c.style.width = w + 'px'; c.style.height = h + 'px' }
    const g = c.getContext('2d')
    g.setTransform(d, 0, 0, d, 0, 0); g.clearRect(0, 0, w, h); g.imageSmoothingEnabled = false
    g.font = '12px system-ui,sans-serif'; g.textBaseline = 'middle'
    return g
  }
  function image(w, h, fill) {                                 // pixels of a picture, onto the hidden canvas
    small.width = w; small.height = h
    const pixels = paint.createImageData(w, h)
    fill(new Uint32Array(pixels.data.buffer), lut[+dark]); paint.putImageData(pixels, 0, 0)
  }
  function states(first, n) {                                  // n heads' states, one below the other
    image(C, n * R, (to, palette) => {
      for (let h = first, k = 0, at0 = lth(at.l, at.t, first) * R * C; h < first + n; h++) {
        const unit = film.state_scale[at.l * H + h], hi = limit(at.l, h)
        for (const end = (h - first + 1) * R * C; k < end; k++) to[k] = palette[place(halves[film.states[at0 + k]] * unit, -hi, hi)] } })
  }
  let tiles
  function plan() {                                            // how big the pictures are
    const W = Math.max(box.clientWidth - 30, 240), wide = W > 760 ? W * .5 : W
    const across = H <= 4 ? H : H <= 8 ? 4 : Math.min(H, Math.max(4, Math.ceil(Math.sqrt(H))))
    const zoom = Math.max(1, Math.min(96 / Math.max(R, C), 10, (wide / across - 8) / C))
    const grow = zoom >= 2 ? Math.floor(zoom) : zoom
    const pitch = C * grow + 8, left = W > 760 ? (W - (H > 1) * (across * pitch + 28) - 28) / 2 : (W - 24) / 2
    $('.grid').parentElement.style.flex = W > 760 ? '' : '1 0 100%'       // the two large pictures stay side by side
    tiles = {across, w: C * grow, h: R * grow, one: Math.max(1, Math.floor(Math.min(left, 260) / Math.max(R, C))), W, pitch, tall: R * grow + 22}
  }
  function drawGrid() {
    const {across, w, h, pitch, tall} = tiles, g = canvas($('.grid'), Math.min(across, H) * pitch, Math.ceil(H / across) * tall)
    states(0, H)
    for (let k = 0; k < H; k++) {
      const x = k % across * pitch + 2, y = Math.floor(k / across) * tall + 18
      g.fillStyle = k == at.h ? colours.ink : colours.soft
      g.fillText(film.heads[k], x, y - 9, w); g.drawImage(small, 0, k * R, C, R, x, y, w, h)
      g.lineWidth = k == at.h ? 2 : 1; g.strokeStyle = k == at.h ? colours.ink : colours.line
      g.strokeRect(x - g.lineWidth / 2, y - g.lineWidth / 2, w + g.lineWidth, h + g.lineWidth)
    }
  }
  function drawOne() {
    const z = tiles.one, g = canvas($('.one'), C * z, R * z), v = canvas($('.wrote'), C * z, R * z)
    for (const x of ['.one', '.wrote']) $(x).parentElement.style.width = C * z + 'px'
    states(at.h, 1); g.drawImage(small, 0, 0, C * z, R * z)
    image(C, R, (to, palette) => { for (let i = 0; i < R; i++) for (let j = 0; j < C; j++)
      to[i * C + j] = palette[place(write(at.l, at.t, at.h, i, j), -writeTop, writeTop)] })
    v.drawImage(small, 0, 0, C * z, R * z)
    for (const x of [g, v]) { x.strokeStyle = colours.line; x.lineWidth = 1; x.strokeRect(.5, .5, C * z - 1, R * z - 1) }
  }
  const ROW = 20
  function drawRows() {
    const W = tiles.W - (H > 25 ? 16 : 0), g = canvas($('.rows'), W, (H + 1) * ROW), slim = W < 620
    const x = slim ? [0, 46, 46 + W * .14, 0, W * .36, W * .5, W * .6] : [0, 70, 70 + W * .13, 70 + W * .2, W * .43, W * .57, W * .64]
    g.fillStyle = colours.soft
    const titles = ['head', 'keeps', '', slim ? '' : 'horizon', 'writes', '', film.said ? 'would say' : '']
    titles.forEach((s, i) => g.fillText(s, x[i] + (i ? 0 : 4), ROW / 2))
    for (let h = 0; h < H; h++) {
      const y = (h + 1) * ROW, k = lth(at.l, at.t, h), [kept, lo, hi] = film.decay.subarray(3 * k, 3 * k + 3)
      if (h == at.h && H > 1) { g.fillStyle = colours.mark; g.fillRect(0, y, W, ROW) }
      g.fillStyle = colours.ink; g.fillText(film.heads[h], 4, y + ROW / 2)
      const bar = (left, room, share, fill) => { g.fillStyle = colours.line; g.fillRect(left, y + ROW / 2 + 5, room, 1)
        g.fillStyle = fill; g.fillRect(left, y + 5, room * Math.min(1, share), ROW - 10) }
      bar(x[1], x[2] - x[1] - 8, kept, colours.s2)
      if (lo < hi) { const r = x[2] - x[1] - 8; g.fillStyle = colours.ink; g.fillRect(x[1] + r * lo, y + ROW / 2 - .5, r * (hi - lo), 1)
        for (const e of [lo, hi]) g.fillRect(x[1] + r * e - .5, y + 6, 1, ROW - 12) }
      bar(x[4], x[5] - x[4] - 8, film.write_norms[k] / normTop, colours.s0)
      g.fillStyle = colours.ink
      g.fillText(num(kept), x[2], y + ROW / 2); g.fillText(num(film.write_norms[k]), x[5], y + ROW / 2)
      if (!slim) g.fillText(horizon(h) + ' steps', x[3], y + ROW / 2, x[4] - x[3] - 10)
      let left = x[6]
      for (const [w] of says(h)) { const s = shown(w), room = g.measureText(s).width
        if (left + room > W) break
        g.fillText(s, left, y + ROW / 2); left += room + 12 }
    }
  }
  const p = film.patches, have = () => p ? p.layers.indexOf(film.layers[at.l]) : -1
  const recovery = (i, j, k) => (p.effects[(i * p.steps.length + j) * p.heads.length + k] - p.patched) / (p.clean - p.patched)
  let grid = null                                              // of the patch map: its layer, scale and cells
  function drawMap() {
    const i = have(), n = p ? p.steps.length : 0, m = p ? p.heads.length : 0
    if (i < 0) return
    const w = Math.min(34, (tiles.W - 40) / n), h = Math.max(4, Math.min(18, 240 / m)), label = w >= 13
    const top = patchTop; grid = {i, w, h, n, m}
    const g = canvas($('.map'), 40 + n * w, m * h + (label ? 84 : 20))
    image(n, m, (to, palette) => { for (let k = 0; k < m; k++) for (let j = 0; j < n; j++) to[k * n + j] = palette[place(recovery(i, j, k), -top, top)] })
    g.drawImage(small, 40, 0, n * w, m * h)
    g.fillStyle = colours.soft; g.textAlign = 'right'
    for (let k = 0, skip = Math.ceil(13 / h); k < m; k += skip) g.fillText(p.heads[k], 34, (k + .5) * h)
    for (let j = 0; j < n; j++) {
      const now = film.patch_steps[j] == at.t, x = 40 + (j + .5) * w
      g.fillStyle = now ? colours.ink : colours.soft
      if (label) { g.save(); g.translate(x, m * h + 5); g.rotate(-Math.PI / 2)
        g.fillText(shown(film.tokens[film.patch_steps[j]]).slice(0, 12), 0, 0); g.restore() }
      if (now) { g.strokeStyle = colours.ink; g.lineWidth = 2; g.strokeRect(x - w / 2, 1, w, m * h - 2)
        if (p.heads[at.h] == film.heads[at.h]) g.strokeRect(x - w / 2, at.h * h, w, h)
        if (!label) { g.textAlign = 'center'; g.fillText('▲', x, m * h + 8); g.textAlign = 'right' } }
    }
    g.textAlign = 'left'
  }

  // -- what changes with a choice of layer, head or colours, and what with every step
  const legend = (to, hi, signed, unit) => { const stops = [1, 32, 64, 96, 128, 160, 192, 224, 255].map(i => both(signed, i))
    $(to).innerHTML = `<span>${num(signed ? -hi : 0)} <b style="background:linear-gradient(90deg,${stops})"></b> ${num(hi)}</span><span>${unit}</span>` }
  function choose() {
    $('.layer').value = at.l
    writeTop = highest(); normTop = strongest()
    let top = 0
    for (let t = 0; t < T; t++) top = Math.max(top, film.write_norms[lth(at.l, t, at.h)])
    const spans = $('.tk').children
    for (let t = 0; t < T; t++) {
      const v = film.write_norms[lth(at.l, t, at.h)], i = place(v, 0, top || 1)
      spans[t].style.setProperty('--l', both(false, i)); spans[t].style.setProperty('--li', `light-dark(${ink(2, i)},${ink(3, i)})`)
      spans[t].title = `${t}: ${JSON.stringify(film.tokens[t])}, write of ${head(at.h)}: norm ${num(v)}`
    }
    legend('.tokens', top || 1, false, `norm of each write of ${head(at.h)}`)
    legend('.of-states', limit(at.l, at.h), true, own ? `for ${head(at.h)}; 1% is beyond` : `for every ${H > 1 ? 'head and ' : ''}step; at most 1% is beyond`)
    legend('.of-writes', writeTop, true, 'for every step')
    $('.patches').hidden = !p
    $('.map').hidden = $('.of-map').hidden = have() < 0
    if (have() >= 0) {
      patchTop = 0
      for (let j = 0; j < p.steps.length; j++) for (let k = 0; k < p.heads.length; k++)
        patchTop = Math.max(patchTop, Math.abs(recovery(have(), j, k)) || 0)
      legend('.of-map', patchTop ||= 1, true, `0 leaves ${p.metric} at ${num(p.patched)}, 1 brings the other prompt's ${num(p.clean)}`)
    }
    $('.d').textContent = have() < 0 ? `No patches of layer ${film.layers[at.l]}, but of ${p?.layers}` : `Patches of layer ${film.layers[at.l]}: `
      + `recovery of ${p.metric}, head by step`
  }
  function settle() {                                          // what need not follow every frame
    const now = `layer ${film.layers[at.l]} after step ${at.t}, token ${JSON.stringify(film.tokens[at.t])}`
    $('.step').setAttribute('aria-valuetext', `step ${at.t}, token ${JSON.stringify(film.tokens[at.t])}`)
    $('.grid').setAttribute('aria-label', `State of each of ${H} heads, ${now}; ${head(at.h)} is chosen`)
    const k = lth(at.l, at.t, at.h)
    $('.one').setAttribute('aria-label', `State of ${head(at.h)}, ${now}: norm ${num(film.state_norms[k])}`)
    $('.wrote').setAttribute('aria-label', `What ${head(at.h)} writes, ${now}: norm ${num(film.write_norms[k])}`)
    $('.rows').setAttribute('aria-label', `What each head keeps, writes and would say, ${now}; the same as a table below`)
    if (p) $('.map').setAttribute('aria-label', `Recovery by head and step, ${now}`)
    if ($('details').open) table()
    tell({layer: film.layers[at.l], step: at.t, head: film.heads[at.h]})
  }
  function table() {
    const t = element('table', ''), names = ['head', 'keeps', 'horizon', 'state norm', 'write norm', 'would say']
    const row = (tag, cells) => {
      const tr = element('tr', ''), more = tag == 'th' ? {scope: 'col'} : {}
      cells.forEach((s, i) => tr.append(element(tag, s, {className: i && i < 5 ? 'n' : '', ...more}))); t.append(tr) }
    row('th', names)
    for (let h = 0; h < H; h++) { const k = lth(at.l, at.t, h)
      row('td', [film.heads[h], keeps(h), horizon(h), num(film.state_norms[k]), num(film.write_norms[k]),
                 says(h).map(([w, x]) => `${JSON.stringify(w)} ${num(x)}`).join('  ')]) }
    $('.sc').replaceChildren(t)
  }
  let before = null
  function draw() {
    due = 0
      dark = getComputedStyle(probe).color.startsWith('rgb(255')
    for (const k of ['ink', 'soft', 'line', 'back', 'mark', 's0', 's2']) {
      probe.style.setProperty('background-color', `var(--${k})`); colours[k] = getComputedStyle(probe).backgroundColor }
    const token = JSON.stringify(film.tokens[at.t])
    $('.now').textContent = `step ${at.t} of ${T - 1}   ${token.length > 18 ? token.slice(0, 17) + '…' : token}`
    $('.step').value = at.t
    const span = $('.tk').children[at.t]
    if (before != span) { before?.classList.remove('mk'); span.classList.add('mk'); before = span
      const tk = $('.tk'), y = span.offsetTop
      if (y < tk.scrollTop || y + span.offsetHeight > tk.scrollTop + tk.clientHeight) tk.scrollTop = y - tk.clientHeight / 2 }
    const k = lth(at.l, at.t, at.h)
    $('.a').textContent = `State of each head of layer ${film.layers[at.l]}`
    $('.b').textContent = H > 1 ? `State of ${head(at.h)}` : `State of layer ${film.layers[at.l]}, ${head(at.h)}`
    $('.c').textContent = `Written by ${token}`
    $('.one + .note').textContent = `norm ${num(film.state_norms[k])}`
    $('.wrote + .note').textContent = `norm ${num(film.write_norms[k])}`
    drawGrid(); drawOne(); drawRows(); drawMap()
    box.dataset.frames = ++frames; box.dataset.step = at.t
    if (!playing) settle()
  }
  const later = () => { due ||= requestAnimationFrame(draw) }
  function go(change) {
    const moved = Object.keys(change).filter(k => change[k] !== undefined && at[k] != change[k])
    Object.assign(at, Object.fromEntries(moved.map(k => [k, change[k]])))
    if (moved.some(k => k != 't')) choose()
    if (moved.length) later()
  }
  const step = t => go({t: Math.max(0, Math.min(T - 1, t))})

  // -- playing
  function label() { const b = $('button'); b.textContent = playing ? '❚❚ Pause' : '▶ Play'; b.setAttribute('aria-label', playing ? 'Pause' : 'Play') }
  function pause() { if (playing) cancelAnimationFrame(playing.id); playing = null; label(); later() }
  function run() {
    if (at.t == T - 1) step(0)
    playing = {since: performance.now()}
    const tick = now => {
      if (!playing) return
      if (!box.isConnected) return pause()
      playing.id = requestAnimationFrame(tick)
      if (now - playing.since < 1000 / +$('.speed').value - 4) return
      playing.since = now
      if (at.t == T - 1) return pause()
      at.t++; draw()
    }
    playing.id = requestAnimationFrame(tick); label()
  }
  const toggle = () => playing ? pause() : run()

  // -- listening
  film.tokens.forEach((s, t) => { $('.tk').append(element('span', shown(s), {onclick: () => step(t)})) })
  $('.tk').setAttribute('aria-label', `${T} tokens; the current one is outlined`)
  film.layers.forEach((l, i) => $('.layer').append(element('option', l, {value: i})))
  $('.layer').parentElement.hidden = L < 2; $('.own').parentElement.hidden = $('.grid').parentElement.hidden = H < 2
  Object.assign($('.step'), {max: T - 1, ariaLabel: 'step', oninput: e => step(+e.target.value)})
  $('button').onclick = toggle
  $('.layer').onchange = e => go({l: +e.target.value})
  $('.own').onchange = e => { own = !!e.target.value; choose(); later() }
  $('details').ontoggle = () => $('details').open && table()
  box.onkeydown = e => {
    const from = e.target.tagName, way = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[e.key]
    if (from == 'SELECT' || e.ctrlKey || e.metaKey || e.altKey || e.target.className == 'sc') return
    if (way) { step(at.t + way[0]); go({h: Math.max(0, Math.min(H - 1, at.h + way[1]))}) }
    else if (e.key == 'Home') step(0); else if (e.key == 'End') step(T - 1)
    else if (e.key == ' ' && from != 'BUTTON' && from != 'SUMMARY') toggle()
    else return
    e.preventDefault(); e.stopPropagation()
  }
  const spot = (e, c) => { const b = c.getBoundingClientRect(); return [(e.clientX - b.left) * parseFloat(c.style.width) / b.width, e.clientY - b.top] }
  const tile = e => { const [x, y] = spot(e, $('.grid')), a = Math.floor(x / tiles.pitch), b = Math.floor(y / tiles.tall), k = b * tiles.across + a
    if (a >= tiles.across || k >= H || k < 0) return null
    const j = Math.floor((x - a * tiles.pitch - 2) / tiles.w * C), i = Math.floor((y - b * tiles.tall - 18) / tiles.h * R)
    return {k, i: i >= 0 && i < R && j >= 0 && j < C ? i : -1, j} }
  const say = (to, s) => { $(to).textContent = s }
  const about = (h, i, j) => `${head(h)}, ${block(i, j)}: ${num(cell(at.l, at.t, h, i, j))}${pooled}`
  $('.grid').onclick = e => { const s = tile(e); if (s) go({h: s.k}) }
  $('.grid').onpointermove = e => { const s = tile(e); if (s) say('.cells',
    (s.i < 0 ? head(s.k) : about(s.k, s.i, s.j)) + `; norm of the state ${num(film.state_norms[lth(at.l, at.t, s.k)])}`) }
  for (const [name, f] of [['.one', (i, j) => about(at.h, i, j)],
    ['.wrote', (i, j) => `written to ${head(at.h)}, ${block(i, j)}: ${num(write(at.l, at.t, at.h, i, j))}${pooled}`]])
    $(name).onpointermove = e => { const [x, y] = spot(e, $(name))
      say('.cells', f(Math.max(0, Math.min(R - 1, Math.floor(y / tiles.one))), Math.max(0, Math.min(C - 1, Math.floor(x / tiles.one))))) }
  const line = e => { const h = Math.floor(spot(e, $('.rows'))[1] / ROW) - 1; return h >= 0 && h < H ? h : null }
  $('.rows').onclick = e => { const h = line(e); if (h !== null) go({h}) }
  $('.rows').onpointermove = e => { const h = line(e); if (h !== null) say('.said',
    `${head(h)} keeps ${keeps(h)}, horizon ${horizon(h)} steps; writes ${num(film.write_norms[lth(at.l, at.t, h)])}`
    + (film.said ? '; would say ' + says(h).map(([w, x]) => `${JSON.stringify(w)} ${num(x)}`).join(', ') : '')) }
  const patch = e => { const [x, y] = spot(e, $('.map')), j = Math.floor((x - 40) / grid.w), k = Math.floor(y / grid.h)
    return j >= 0 && j < grid.n && k >= 0 && k < grid.m ? [j, k] : null }
  $('.map').onclick = e => { const s = patch(e); if (!s) return
    const h = film.heads.indexOf(p.heads[s[1]]); go({t: film.patch_steps[s[0]], h: h < 0 ? undefined : h}) }
  $('.map').onpointermove = e => { const s = patch(e); if (!s) return
    const k = (grid.i * grid.n + s[0]) * grid.m + s[1]
    say('.patched', `head ${p.heads[s[1]]}, step ${film.patch_steps[s[0]]} ${JSON.stringify(film.tokens[film.patch_steps[s[0]]])}: `
      + `${p.metric} ${num(p.effects[k])}, recovery ${num(recovery(grid.i, ...s))}${p.exact[k] ? '' : ' (estimated)'}`) }

  const look = new ResizeObserver(() => { plan(); later() }), theme = new MutationObserver(later)
  look.observe(box)
  for (const e of [document.documentElement, document.body]) theme.observe(e, {attributes: true})
  const scheme = matchMedia('(prefers-color-scheme:dark)')
  scheme.addEventListener('change', later)
  const set = s => go({l: s.layer === undefined ? undefined : film.layers.indexOf(s.layer), t: s.step,
                       h: s.head === undefined ? undefined : film.heads.indexOf(s.head)})
  plan(); label(); Object.assign(at, {l: film.layers.indexOf(start.layer), t: start.step, h: film.heads.indexOf(start.head)})
  choose(); later()
  return {set, stop() { pause(); cancelAnimationFrame(due); look.disconnect(); theme.disconnect(); scheme.removeEventListener('change', later) }}
}

async function unpack(text) {                                  // the film and the colours, which travel as steps from one to the next
  const zipped = new Blob([Uint8Array.from(atob(text), x => x.charCodeAt(0))]).stream().pipeThrough(new DecompressionStream('gzip'))
  const all = new Uint8Array(await new Response(zipped).arrayBuffer()), ramps = all.slice(0, 3072)
  for (let i = 3; i < ramps.length; i++) ramps[i] += ramps[i - 3]
  return [all.slice(3072), ramps]
}

// From a page or a saved notebook: every film that does not play yet, once it can be seen.
export function films() {
  for (const e of document.querySelectorAll('.film-root:not([data-on])')) { e.dataset.on = 1
    const s = e.querySelector('script[type="text/plain"]').textContent, start = JSON.parse(e.dataset.start)
    const watch = new ResizeObserver(() => { if (e.clientWidth) { watch.disconnect(); unpack(s).then(parts => mount(e, ...parts, start)) } })
    watch.observe(e) }
}

export default {
  render({model, el}) {
    const names = ['layer', 'step', 'head'], now = () => Object.fromEntries(names.map(k => [k, model.get(k)]))
    const ramps = model.get('ramps')
    const view = mount(el, model.get('data'), new Uint8Array(ramps.buffer, ramps.byteOffset, ramps.byteLength), now(), s => {
      if (names.every(k => model.get(k) === s[k])) return
      for (const k of names) model.set(k, s[k])
      model.save_changes() })
    const hear = () => view.set(now())
    for (const k of names) model.on(`change:${k}`, hear)
    return () => { for (const k of names) model.off(`change:${k}`, hear); view.stop() }
  }
}
