// What can be moved and clicked in lessons, made of what cells have put out: `.play-line` has values, `.play-net` is a table.
function svg(tag, attrs, ...children) {
  const e = document.createElementNS('http://www.w3.org/2000/svg', tag)
  for (const [k, v] of Object.entries(attrs)) e.setAttribute(k, v)
  e.append(...children)
  return e
}
function slider(name, min, max, step, value, change) {
  const out = make('output', {}, String(value)), input = make('input', {type: 'range', min, max, step, value})
  input.addEventListener('input', () => { out.textContent = input.value; change() })
  return {label: make('label', {}, name, input, out), get value() { return Number(input.value) }}
}

// Scale and zero point as `qparams` has them, and a value there and back
function qparams(lo, hi, bits, symmetric) {
  const [first, last] = symmetric ? [1-2**(bits-1), 2**(bits-1)-1] : [0, 2**bits-1]
  const s = symmetric ? Math.max(lo/first, hi/last) : (hi-lo)/last, z = symmetric ? 0 : Math.round(-lo/s)
  const back = x => s*(Math.min(last, Math.max(first, Math.round(x/s)+z))-z)
  return {s, z, back, points: Array.from({length: last-first+1}, (_, i) => s*(first+i-z))}
}
function playLine(div) {
  const values = div.dataset.values.split(' ').map(Number), edge = 3, at = v => 20+(v+edge)/(2*edge)*560
  const bits = slider('Bits', 2, 8, 1, 4, draw), lo = slider('From', -edge, 0, .1, -2.2, draw), hi = slider('to', .1, edge, .1, 2.2, draw)
  const symmetric = make('input', {type: 'checkbox', checked: true})
  symmetric.addEventListener('change', draw)
  const picture = svg('svg', {viewBox: '0 0 600 130', role: 'img'}), said = make('p', {role: 'status'})
  function draw() {
    const g = qparams(lo.value, hi.value, bits.value, symmetric.checked), near = values.map(g.back)
    const mse = values.reduce((sum, v, i) => sum+(v-near[i])**2, 0)/values.length, power = values.reduce((sum, v) => sum+v*v, 0)/values.length
    const [first, last] = [g.points[0]-g.s/2, g.points.at(-1)+g.s/2], clipped = values.filter(v => v < first || v > last).length
    picture.replaceChildren(...g.points.map(p => svg('line', {x1: at(p), x2: at(p), y1: 88, y2: 104, class: 'grid'})),
      ...values.map((v, i) => svg('line', {x1: at(v), y1: 30, x2: at(near[i]), y2: 86, class: v < first || v > last ? 'move clipped' : 'move'})),
      ...values.map(v => svg('circle', {cx: at(v), cy: 28, r: 4})),
      ...[-3, -2, -1, 0, 1, 2, 3].map(v => svg('text', {x: at(v), y: 124, 'text-anchor': 'middle'}, String(v))))
    said.textContent = `${g.points.length} values, ${g.s.toFixed(3)} apart, zero point ${g.z}. Mean squared error ${mse.toPrecision(3)}, ${(10*Math.log10(power/mse)).toFixed(1)} dB; ${clipped} of ${values.length} clipped.`
    picture.setAttribute('aria-label', 'Weights above, the values that are kept of them below. '+said.textContent)
  }
  div.classList.add('play')
  div.replaceChildren(make('div', {className: 'controls'}, bits.label, lo.label, hi.label, make('label', {}, symmetric, 'symmetric')), picture, said)
  draw()
}

// A button for each place of the net; the one that is chosen is told about below
function playNet(table) {
  const names = [...table.tHead.rows[0].cells].map(c => c.textContent), said = make('dl', {role: 'status'})
  const rows = [...table.tBodies[0].rows].map(r => [...r.cells].map(c => c.textContent))
  const col = name => names.indexOf(name), most = Math.max(...rows.map(r => Number(r[col('dB')])))
  const buttons = rows.map(r => {
    const bar = make('i', {}), b = make('button', {type: 'button'}, r[0], make('small', {}, r[col('what')]), bar)
    bar.style.width = `${100*r[col('dB')]/most}%`
    b.addEventListener('click', () => choose(b, r))
    return b
  })
  function choose(button, row) {
    for (const b of buttons) b.setAttribute('aria-pressed', String(b === button))
    said.replaceChildren(...names.flatMap((n, i) => row[i] ? [make('dt', {}, n), make('dd', {}, row[i])] : []))
  }
  const all = make('details', {}, make('summary', {}, 'All of it as a table')), play = make('div', {className: 'play play-buttons'}, make('div', {className: 'chain'}, ...buttons), said, all)
  const wide = table.closest('.wide') || table
  wide.replaceWith(play)
  all.append(wide)
  choose(buttons[1], rows[1])
}
for (const div of all('.play-line')) playLine(div)
for (const table of all('.play-net')) playNet(table)
