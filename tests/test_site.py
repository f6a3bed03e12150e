"Every page of the docs, as it is published, in a real browser"
import functools, itertools, json, re, shutil, subprocess, sys, threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse
import pytest, torch
from fastquant.quant.grid import Grid, fake_quant, qparams

webdriver = pytest.importorskip('selenium.webdriver', reason='selenium drives the browser: pip install -e ".[dev]"')
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.support.ui import WebDriverWait

chromium = next(filter(None, map(shutil.which, ('chromium','google-chrome','chromium-browser'))), None)
driver = shutil.which('chromedriver')
pytestmark = pytest.mark.skipif(not (chromium and driver), reason='the docs are opened in Chromium: apt-get install chromium chromium-driver')
root = Path(__file__).parent.parent
flags = '''--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
    --disable-sync --disable-dev-shm-usage --hide-scrollbars'''.split()
missing = re.compile(r'\$[^$\n]{1,200}\$|\\(?:frac|begin|mathrm|left|right|sum|sqrt|text|hat|quad)\b') # LaTeX that nobody has set
directive = re.compile(r'^\s*(?:#\|\s*\w|:{3,}|`{3,}|\{=html\})', re.M)

@pytest.fixture(scope='module')
def site():
    "The folder with the built docs: built now, unless they are newer than all that they are made of"
    made,of = root/'_docs'/'index.html',[*root.glob('nbs/**/[!_.]*.ipynb'),*root.glob('nbs/*.yml'),*root.glob('scripts/**/*.*'),*root.glob('benchmarks/results/*')]
    if not made.exists() or made.stat().st_mtime<max(f.stat().st_mtime for f in of):
        r = subprocess.run([sys.executable, 'scripts/docs.py'], cwd=root, capture_output=True, text=True)
        assert r.returncode==0, r.stdout+r.stderr
    return made.parent

@contextmanager
def served(folder):
    "The address of `folder`"
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    with ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()

@pytest.fixture(scope='module')
def url(site):
    with served(site) as u: yield u

@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    o = webdriver.ChromeOptions()
    o.binary_location = chromium
    for f in [*flags, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]: o.add_argument(f)
    o.set_capability('goog:loggingPrefs', dict(browser='ALL', performance='ALL'))
    b = webdriver.Chrome(options=o, service=Service(driver))
    yield b
    b.quit()

def size(b, width, height=900): b.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(width=width, height=height, deviceScaleFactor=1, mobile=width<600))
def scheme(b, name): b.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(features=[dict(name='prefers-color-scheme', value=name)]))

look = '''
const text = document.querySelector('main').cloneNode(true), shown = document.querySelector('main').innerText
text.querySelectorAll('pre, code, math').forEach(o => o.remove())
return {ids: [...document.querySelectorAll('[id]')].map(o => o.id), links: [...document.querySelectorAll('a[href]')].map(o => o.href),
    prose: [...document.querySelectorAll('main > :not(footer) a[href]')].map(o => o.href),
    silent: [...document.images].filter(o => !o.alt.trim()).map(o => o.src), levels: [...document.querySelectorAll('main :is(h1,h2,h3,h4,h5,h6)')].map(o => +o.tagName[1]),
    cut: [...document.querySelectorAll('main :is(.wide, p)')].filter(o => o.scrollWidth > o.clientWidth+1).map(o => o.innerText.slice(0, 60)),
    weight: performance.getEntries().filter(o => !/\\.(png|jpe?g|gif|svg)$/.test(o.name)).reduce((sum, o) => sum+(o.encodedBodySize || 0), 0),
    broken: [...document.images].filter(o => !o.complete || !o.naturalWidth).map(o => o.src), text: text.textContent, shown,
    formulas: [...document.querySelectorAll('math')].map(o => o.getBoundingClientRect().width)}'''

contrast = '''const parse = c => (c.match(/[\\d.]+/g) || []).map(Number), light = ([r,g,b]) => [r,g,b].map(v => (v/=255) <= .03928 ? v/12.92 : ((v+.055)/1.055)**2.4)
    .reduce((sum, v, i) => sum+v*[.2126,.7152,.0722][i], 0)
const known = new Map([[null,[255,255,255]]]) // of what each lies on, so that nothing is asked twice
const behind = e => {
    if (!known.has(e)) { const c = parse(getComputedStyle(e).backgroundColor); known.set(e, c.length && c[3] !== 0 ? c : behind(e.parentElement)) }
    return known.get(e) }
const says = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())
return [...document.querySelectorAll('body *')].filter(e => says(e) && e.checkVisibility({opacityProperty: true})).map(e => {
    const [a,b] = [light(parse(getComputedStyle(e).color)),light(behind(e))].sort((x, y) => y-x); return [(a+.05)/(b+.05), e.textContent.slice(0, 40)] }).filter(([c]) => c < 4.5)'''

def faint(b):
    "Text with less than the contrast that WCAG 2 asks for (4.5), in light or dark, whatever colors the saved outputs bring along"
    found = []
    for name in ('dark','light'):
        scheme(b, name)
        found += [(name, *o) for o in b.execute_script(contrast)[:5]]
    return found

def requests(b):
    "What pages have asked for since last time, and what of it has failed; what the browser asks for by itself is left out"
    events = [json.loads(e['message'])['message'] for e in b.get_log('performance')]
    of = lambda m: [e['params'] for e in events if e['method']==m]
    asked = {e['requestId']:e['request']['url'] for e in of('Network.requestWillBeSent') if e['documentURL'].startswith('http')}
    failed = [e['requestId'] for e in of('Network.loadingFailed')] + [e['requestId'] for e in of('Network.responseReceived') if e['response']['status']>=400]
    return list(asked.values()),[asked[i] for i in failed if i in asked]

def visit(b, url, name):
    "What there is to see of the page `name`, on a desk and on a phone"
    size(b, 1400)
    b.get(url+name)
    asked,failed = requests(b)
    p = dict(b.execute_script(look), asked=asked, failed=failed, errors=[e['message'] for e in b.get_log('browser') if e['level']=='SEVERE'])
    p['faint'] = faint(b)
    size(b, 390)
    squeezed = '[...document.querySelectorAll("td code")].filter(o => o.getClientRects().length > 8).map(o => o.innerText)'
    return dict(p, width=b.execute_script('return document.documentElement.scrollWidth'), squeezed=b.execute_script('return '+squeezed))

@pytest.fixture(scope='module')
def pages(site, url, browser): return {n:visit(browser, url, n) for n in sorted(f.relative_to(site).as_posix() for f in site.rglob('*.html'))}

def each(pages, what):
    "What `what` finds wrong with `pages`, by page"
    return {k:bad for k,p in pages.items() if (bad:=what(p))}

checks = dict(error_in_the_console=lambda p: p['errors'], request_that_fails=lambda p: p['failed'], broken_picture=lambda p: p['broken'],
    other_host=lambda p: [u for u in p['asked'] if not u.startswith(('http://127.0.0.1:','data:'))],
    scrolling_sideways_on_a_phone=lambda p: p['width']>390 and p['width'], raw_latex=lambda p: missing.findall(p['text']),
    silent_picture=lambda p: p['silent'], skipped_level=lambda p: [b for a,b in itertools.pairwise(p['levels']) if b>a+1], faint_text=lambda p: p['faint'],
    table_cut_off=lambda p: p['cut'], code_squeezed_on_a_phone=lambda p: p['squeezed'], heavy_page=lambda p: p['weight']>300_000 and p['weight'],
    directive=lambda p: directive.findall(p['shown']), error_of_a_cell=lambda p: 'Traceback (most recent call last)' in p['shown'])

@pytest.mark.parametrize('no', checks)
def test_no(no, pages): assert not each(pages, checks[no])

def test_checks_find_what_is_wrong(browser, tmp_path):
    "A page on which everything is wrong"
    (tmp_path/'bad.html').write_text('''<main>The sum $x^2$ is <img src="none.png"> <img src="http://localhost:9/x.png"><pre>#| hide
        x = 1</pre><pre>Traceback (most recent call last)</pre><div style="width:500px;color:#aaa">wide</div><h1>1</h1><h3>3</h3>
        <div class="wide" style="width:9rem;overflow:auto"><div style="width:20rem">cut</div></div><table style="overflow-wrap:anywhere"><td width="9"><code>learn.quantize()</code></table></main><script src="big.js"></script><script>throw Error('bad')</script>''')
    (tmp_path/'big.js').write_text('/'*300_001)
    with served(tmp_path) as u: p = visit(browser, u, 'bad.html')
    assert not [k for k,check in checks.items() if not check(p)]

def test_every_notebook_has_a_page(pages): assert len(pages)==len(list(root.glob('nbs/**/[!_.]*.ipynb')))
def test_what_is_tested_is_published(site, pages):
    workflow = (root/'.github'/'workflows'/'docs.yaml').read_text()
    assert 'run: python scripts/docs.py' in workflow and f'path: {site.name}' in workflow and 'quarto' not in workflow
    listed = re.findall('<loc>https://[^/]+/[^/]+/(.*?)</loc>', (site/'sitemap.xml').read_text())
    assert {n or 'index.html' for n in listed}==set(pages)
def test_exported_code_unfolds_where_it_is_told_of(site):
    "A cell that is exported is folded behind its documentation, one of imports is not there twice, and search leaves it out"
    page = ' '.join(re.sub('</?code>', '', (site/'learner'/'compare.html').read_text()).split())
    titles = re.findall('<details class="exported"> <summary> (.*?) </summary>', page)
    assert titles[:3]==['Code of compare','Code of _in_float, _float_twins, _times','Code of _kind, _names'], titles
    assert page.index('Size, work, latency, metrics')<page.index('Code of compare')<page.index('Rows are called after what runs')<page.index('Code of _kind')
    found = json.loads((site/'search-index.js').read_text().removeprefix('const search_index = '))
    told = ' '.join(o['text'] for o in found if o['href'].startswith('learner/compare.html'))
    assert 'Rows are called after what runs' in told and 'self.sums' not in told
def test_docstrings_lead_to_pages(site):
    led = {m[1] for f in root.glob('fastquant/*/**/*.py') if (m:=re.search(r'^Docs: https://[^/]+/[^/]+/(\S+?)"""', f.read_text(), re.M))}
    assert len(led)>90 and not [o for o in led if not (site/o).is_file()]
def test_formulas(pages):
    assert len(pages['quant/grid.html']['formulas'])>10
    assert not each(pages, lambda p: [w for w in p['formulas'] if not w])

def test_every_link_leads_somewhere(pages, url):
    def lost(link):
        to,fragment = urldefrag(link)
        if not to.startswith(url): return urlparse(to).scheme not in ('https','mailto')
        name = to[len(url):] or 'index.html'
        return name not in pages or fragment and unquote(fragment) not in pages[name]['ids']
    assert not each(pages, lambda p: [l for l in p['links'] if lost(l)])

def test_every_page_can_be_reached(pages, url):
    seen,todo = set(),['index.html']
    while todo:
        if (name:=todo.pop()) in seen or name not in pages: continue
        seen.add(name)
        todo += [urldefrag(l)[0][len(url):] for l in pages[name]['links'] if l.startswith(url)]
    assert seen==set(pages)

# What one does with the site

def open_page(b, url, name, width=1280):
    size(b, width)
    b.get(url+name)

def wait(b, what): return WebDriverWait(b, 5, ignored_exceptions=[NoSuchElementException,StaleElementReferenceException]).until(what)
def one(b, css): return b.find_element(By.CSS_SELECTOR, css)
def background(b): return b.execute_script("return getComputedStyle(document.body).backgroundColor")
def luminance(rgb): return sum(map(int, re.findall(r'\d+', rgb)[:3]))/3/255
def in_view(b, id): return b.execute_script('const r = document.getElementById(arguments[0]).getBoundingClientRect(); return r.top>=0 && r.bottom<=innerHeight', id)

def test_search_jumps_to_a_name(browser, url):
    open_page(browser, url, 'quant/grid.html')
    one(browser, 'body').send_keys('/')
    q = browser.switch_to.active_element
    q.send_keys('QuantAwareCallback')
    wait(browser, lambda b: one(b, '#hits li').text.startswith('QuantAware'))
    first = one(browser, '#hits li')
    assert first.is_displayed() and first.text.startswith('QuantAwareCallback')
    q.send_keys(Keys.ENTER)
    wait(browser, lambda b: not one(b, '#hits').is_displayed())
    assert browser.current_url==url+'callback/quant.html#quantawarecallback' and in_view(browser, 'quantawarecallback')
    assert not one(browser, '#hits').is_displayed()

def test_search_finds_what_is_meant(browser, url):
    "Plurals, British spelling, typos, words that a page does not use: the first hit is on a page that a person means"
    open_page(browser, url, 'index.html')
    assert not browser.execute_script('return typeof search_index === "object"'), 'fetched by who does not search'
    wanted = json.loads((root/'tests'/'queries.json').read_text())
    found = browser.execute_async_script('const done = arguments[1]; ready().then(() => done(arguments[0].map(q => search(q)[0]?.href.split("#")[0])))', list(wanted))
    missed = {q:f for (q,pages),f in zip(wanted.items(), found) if f not in pages}
    assert len(wanted)>=40 and len(missed)<=2, missed

def test_search_with_keys_and_without_hits(browser, url):
    open_page(browser, url, 'index.html')
    q = one(browser, '#q')
    q.send_keys('percentile')
    wait(browser, lambda b: one(b, '#hits li + li'))
    q.send_keys(Keys.ARROW_DOWN)
    chosen = lambda: [li.get_attribute('aria-selected') for li in browser.find_elements(By.CSS_SELECTOR, '#hits li')].index('true')
    assert chosen()==1
    q.send_keys(Keys.ARROW_UP)
    assert chosen()==0
    q.send_keys(' xqzvw')
    wait(browser, lambda b: one(b, '#hits').text=='Nothing found')
    q.send_keys(Keys.ESCAPE)
    assert not one(browser, '#hits').is_displayed() and q.get_attribute('value')==''

def test_navigation(browser, url, pages):
    open_page(browser, url, 'index.html')
    titles = [b.text for b in browser.find_elements(By.CSS_SELECTOR, 'nav summary')]
    assert titles==['Start','How-to','Lessons','Benchmarks','With a Learner','While training','Choose grids and ranges','Lose less by rounding','Round a whole model',
        'Prune weights','Remove channels','Factor layers','Learn from a teacher','Run and check a file','Write a file','Ship an app','Look into a model']
    assert len(browser.find_elements(By.CSS_SELECTOR, 'nav li a'))==len(pages)
    one(browser, 'nav details:has(a[href="learner/quant.html"]) summary').click()
    one(browser, 'nav a[href="learner/quant.html"]').click()
    assert browser.current_url==url+'learner/quant.html' and one(browser, 'nav a[aria-current]').get_attribute('href')==url+'learner/quant.html'
    one(browser, '.turn [rel=next]').click()
    assert browser.current_url!=url+'learner/quant.html'
    one(browser, '.turn [rel=prev]').click()
    assert browser.current_url==url+'learner/quant.html'
    one(browser, 'aside li a[href="#the-file"]').click()
    assert in_view(browser, 'the-file')

def test_navigation_on_a_phone(browser, url):
    open_page(browser, url, 'index.html', 390)
    link = one(browser, 'nav a[href="quant/grid.html"]')
    assert not link.is_displayed()
    one(browser, '#menu').click()
    one(browser, 'nav details:has(a[href="quant/grid.html"]) summary').click()
    assert link.is_displayed()
    link.click()
    assert browser.current_url==url+'quant/grid.html' and not one(browser, 'nav').is_displayed() and one(browser, 'main h1').is_displayed()

def test_light_and_dark(browser, url):
    for name,dark in (('light',False), ('dark',True)):
        scheme(browser, name)
        open_page(browser, url, 'index.html')
        assert (luminance(background(browser))<.2)==dark
    one(browser, '#theme').click()
    assert luminance(background(browser))>.8
    browser.get(url+'quant/grid.html')
    assert luminance(background(browser))>.8, 'a choice lasts from page to page'
    one(browser, '#theme').click()
    assert luminance(background(browser))<.2
    browser.execute_script('localStorage.clear()')
    scheme(browser, 'light')

def test_without_a_mouse(browser, url):
    "The first key leads past the menu, what has the focus is seen, search and groups of pages open by keys, and code scrolls within its block"
    open_page(browser, url, 'lesson.quant.html')
    keys = lambda *k: browser.switch_to.active_element.send_keys(*k)
    keys(Keys.TAB)
    active = browser.switch_to.active_element
    assert active.text=='Skip to the text' and active.is_displayed()
    keys(Keys.ENTER)
    assert browser.execute_script('return document.activeElement.id')=='title'
    one(browser, 'nav summary').send_keys(Keys.ENTER)
    assert not one(browser, 'nav details li').is_displayed()
    outline = browser.execute_script('const a = document.querySelector("main p a"); a.focus({focusVisible: true}); return getComputedStyle(a).outlineStyle')
    assert outline=='solid'
    scrolled = browser.execute_script('return [...document.querySelectorAll("main pre")].filter(o => o.scrollWidth > o.clientWidth).map(o => o.tabIndex)')
    assert scrolled and not any(scrolled)

questions = dict(what=('index.html', 'Make a fastai Learner small and fast'), why=('index.html', 'of a quarter of the size that answers several times faster'),
    how=('howto.int8.html', 'quantize'), proof=('benchmarks.html', 'What was promised, what was measured'), install=('index.html', 'make demo'),
    my_data=('howto.images.html', 'How many images are enough'), my_model_type=('howto.supported.html', 'as the tests have found them'),
    lost_accuracy=('howto.accuracy.html', 'max_drop'), deploy=('howto.deploy.html', 'export_app'), undo=('index.html', 'To undo it, go on with'))

@pytest.mark.parametrize('question', questions)
def test_first_questions_are_answered_in_two_clicks(question, pages, url):
    "What somebody asks who has never been here: the page that says it, and how it says it"
    name,words = questions[question]
    inside = lambda n: {urldefrag(l)[0][len(url):] for l in pages[n]['prose'] if l.startswith(url)} & set(pages)
    once = inside('index.html')
    assert name in {'index.html'} | once | {m for n in once for m in inside(n)}
    assert words in pages[name]['shown']

def test_a_number_line_to_play_with(browser, url):
    "Moved by keys, it says the scale, the zero point and the error that the library has"
    open_page(browser, url, 'lesson.quant.html', 390)
    play = wait(browser, lambda b: one(b, '.play-line.play'))
    values = torch.tensor([float(v) for v in play.get_attribute('data-values').split()])
    torch.manual_seed(0)
    assert (values-torch.randn(12).sort().values).abs().max()<1e-3, 'the weights of the figure'
    bits,lo,hi,symmetric = play.find_elements(By.CSS_SELECTOR, 'input')
    bits.send_keys(Keys.ARROW_LEFT)
    hi.send_keys(Keys.ARROW_LEFT*8)
    for signed in (True,False):
        grid = Grid(3, signed)
        s,z = qparams(torch.tensor(-2.2), torch.tensor(1.4), grid)
        mse = (fake_quant(values, s, z, grid)-values).pow(2).mean().item()
        said = play.find_element(By.CSS_SELECTOR, '[role=status]').text
        assert f'{len(range(grid.lo, grid.hi+1))} values, {s.item():.3f} apart, zero point {int(z)}. Mean squared error {mse:.3g}'[:-1] in said, said
        symmetric.send_keys(Keys.SPACE)

def test_a_net_to_click_on(browser, url):
    "Each place tells what the table has of it"
    open_page(browser, url, 'lesson.quant.html')
    wait(browser, lambda b: one(b, '.chain button'))
    rows = browser.execute_script("return [...document.querySelectorAll('.play-net tbody tr')].map(r => [...r.cells].map(c => c.textContent))")
    buttons = browser.find_elements(By.CSS_SELECTOR, '.chain button')
    assert len(rows)==len(buttons)>5
    for b,row in zip(buttons, rows):
        b.send_keys(Keys.ENTER)
        assert b.get_attribute('aria-pressed')=='true' and [d.text for d in browser.find_elements(By.CSS_SELECTOR, '.play dd')]==[v for v in row if v]
