"The page of an app in a real browser, against the Learner"
import json, os
from pathlib import Path
import numpy as np, onnx, pytest
from fastai.vision.all import CategoryBlock, DataBlock, Image, ImageBlock, Learner, MaskBlock, Normalize, PILImageBW, RandomSplitter, Resize, \
    aug_transforms, get_image_files, imagenet_stats, nn, parent_label, set_seed
from fastquant.all import *
from fastquant.export.intact import metadata_of, sealed_bytes
from ..helpers.browser import chromium, chromium_at, driver, served
from ..helpers.data import digits
from ..helpers.learners import quiet
from ..helpers.photos import huge_png, interlaced_png

pytest.importorskip('selenium.webdriver', reason='selenium drives the browser: pip install -e ".[dev]"')
from selenium.webdriver.support.ui import WebDriverWait

web = Path(os.environ.get('ONNXRUNTIME_WEB', 'node_modules/onnxruntime-web')).absolute()
pytestmark = [pytest.mark.skipif(not (chromium and driver), reason='the page is opened in Chromium: apt-get install chromium chromium-driver'),
    pytest.mark.skipif(not web.exists(), reason='the page runs by onnxruntime-web: npm install onnxruntime-web')]
modes = dict(RGB='jpg', L='png', P='png', RGBA='png', CMYK='jpg', LA='png')
sizes = (24,24),(3,90),(90,4),(24,60),(61,24),(13,17),(200,150)

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "Digits in all modes and sizes, which EXIF would turn"
    to = tmp_path_factory.mktemp('page')
    for i in range(84):
        mode,ext = list(modes.items())[i%6]
        im = Image.fromarray((digits.images[i]*15.9).astype('uint8')).resize(sizes[i%7], Image.BICUBIC)
        noise = Image.fromarray(np.random.default_rng(i).integers(0, 200, (*sizes[i%7][::-1],3), dtype=np.uint8))
        rgb,exif = Image.blend(im.convert('RGB'), noise, .3),Image.Exif()
        if mode in ('RGBA','LA'): rgb.putalpha(im)
        exif[0x0112] = 1+i%8
        f = to/'pics'/str(i%3)/f'{i}.{ext}'
        f.parent.mkdir(parents=True, exist_ok=True)
        rgb.convert(mode).save(f, exif=exif, **dict(quality=95) if ext=='jpg' else {})
    return to

ways = dict(crop=([Resize(24)], aug_transforms(size=(12,14), min_scale=.75), ImageBlock), pad=([Resize((20,28), method='pad')], None, ImageBlock),
    grey=([Resize(24, method='squish')], aug_transforms(size=40, align_corners=False), ImageBlock(PILImageBW)))

def app_of(root, name):
    item,batch,x = ways[name]
    set_seed(0)
    norm = [] if name=='grey' else [Normalize.from_stats(*imagenet_stats)]
    data = dict(get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.3, seed=0))
    block = DataBlock((x,CategoryBlock), item_tfms=item, batch_tfms=[*(batch or []),*norm], **data)
    dls = block.dataloaders(root/'pics', bs=8, num_workers=0, device='cpu')
    net = nn.Sequential(nn.Conv2d(1 if name=='grey' else 3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3))
    learn = quiet(Learner(dls, net, path=root))
    return learn,learn.export_app(root/'apps'/name, page=web)

@pytest.fixture(scope='module')
def apps(root):
    (root/'apps').mkdir()
    return {k:app_of(root, k) for k in ways}

@pytest.fixture(scope='module')
def url(root):
    with served(root) as u: yield u

@pytest.fixture(scope='module')
def browser():
    with chromium_at() as b: yield b

asked = '''
const [names, done] = arguments, out = []
;(async () => {
  await model
  for (const n of names) {
    const got = await fetch(n), blob = await got.blob()
    try { const o = await answer(new File([blob], n, {type: blob.type})); out.push({x: [...o.x.a], said: o.said}) } catch (e) { out.push({error: e.message, bad: e instanceof BadInput}) }
  }
  return out
})().then(done, e => done(String(e)))'''

@pytest.mark.parametrize('name', ways)
def test_the_page_says_what_the_learner_does(name, apps, root, url, browser):
    learn,to = apps[name]
    browser.get(f'{url}apps/{name}/index.html')
    assert browser.execute_async_script('const d = arguments[0]; model.then(check).then(d, e => d(String(e)))')==[True]*3
    files = get_image_files(root/'pics')
    found = browser.execute_async_script(asked, [f'../../{f.relative_to(root)}' for f in files])
    x,p,_ = learn.get_preds(dl=learn.dls.test_dl(files, num_workers=0), with_input=True)
    std = 1 if name=='grey' else np.float32(imagenet_stats[1])[:,None,None]
    off = [np.abs((np.float32(o['x']).reshape(t.shape)-t.numpy())*std).max()*255 for o,t in zip(found, x)]
    bad = [(f.name, round(float(o), 1)) for f,o in zip(files, off) if o>1.01]
    assert len(bad)<=.02*len(files), bad
    assert np.mean([o['said'][0][0]==learn.dls.vocab[i] for o,i in zip(found, p.argmax(1))])>=.99

def test_transparent_and_interlaced_pictures(apps, root, url, browser):
    "Colours below what is transparent count, as they do for the Learner"
    learn,_ = apps['crop']
    (root/'odd').mkdir()
    rng,exif = np.random.default_rng(0),Image.Exif()
    exif[0x0112] = 6
    for c in 2,3,4: (root/'odd'/f'{c}.png').write_bytes(interlaced_png(rng.integers(0, 256, (33,47,c), dtype=np.uint8)))
    for k,c,how in ('a',3,{}),('b',4,{}),('c',4,dict(exif=exif)):
        Image.fromarray(rng.integers(0, 256, (33,47,c), dtype=np.uint8)).save(root/'odd'/f'{k}.webp', lossless=True, exact=True, **how)
    files = sorted((root/'odd').iterdir())
    browser.get(f'{url}apps/crop/index.html')
    found = browser.execute_async_script(asked, [f'../../odd/{f.name}' for f in files])
    x, = learn.dls.test_dl(files, bs=len(files), num_workers=0).one_batch()
    std = np.float32(imagenet_stats[1])[:,None,None]
    off = {f.name:float(np.abs((np.float32(o['x']).reshape(t.shape)-t.numpy())*std).max()*255) for f,o,t in zip(files, found, x)}
    assert max(off.values())<1.01, off

def requests(b):
    "What the page has asked for"
    events = [json.loads(e['message'])['message'] for e in b.get_log('performance')]
    return [e['params']['request']['url'] for e in events if e['method']=='Network.requestWillBeSent' and e['params']['documentURL'].startswith('http')]

def test_the_page_asks_nobody_else(apps, url, browser):
    browser.get(f'{url}apps/crop/index.html')
    browser.execute_async_script('const d = arguments[0]; model.then(check).then(d)')
    asked = requests(browser)
    assert any(u.endswith('.wasm') for u in asked) and all(u.startswith((url,'blob:','data:')) for u in asked), asked

def test_a_photo_is_taken(apps, root, url, browser):
    "Through the page itself"
    browser.get(f'{url}apps/crop/index.html')
    browser.execute_async_script('const d = arguments[0]; model.then(() => d())')
    browser.find_element('id', 'file').send_keys(str(get_image_files(root/'pics')[0]))
    WebDriverWait(browser, 10).until(lambda b: b.find_element('id', 'said').text.endswith(' ms'))
    assert len(browser.find_elements('css selector', '#answer div'))==3

def test_what_is_wrong_with_a_picture(apps, root, url, browser):
    whole = (root/'pics'/'0'/'0.jpg').read_bytes()
    png = next((root/'pics').rglob('1.png')).read_bytes()
    wrong = {'short.jpg':whole[:-200], 'short.png':png[:-40], 'text.jpg':b'no picture', 'empty.png':b'', 'rows.csv':b'a,b\n1,2\n', 'huge.png':huge_png()}
    for k,b in wrong.items(): (root/k).write_bytes(b)
    browser.get(f'{url}apps/crop/index.html')
    found = browser.execute_async_script(asked, [f'../../{k}' for k in wrong])
    assert all(o.get('bad') and ('damaged or cut short' in o['error'] or 'no picture that this browser can read' in o['error']) for o in found), found

def test_what_is_wrong_with_a_model(apps, root, url, browser):
    data = (apps['crop'][1]/'model.onnx').read_bytes()
    at = len(data)//2
    wrong = dict(flipped=data[:at]+bytes([data[at]^1])+data[at+1:], short=data[:-30], empty=b'', newer=said_of(data, dict(version=3)))
    wrong['cannot'] = said_of(data, dict(version=1, cannot='x'))
    says = dict(flipped='damaged', short='damaged', empty='damaged', newer='newer fastquant', cannot='does not say how')
    for k,b in wrong.items():
        to = root/'apps'/k
        to.mkdir()
        for f in apps['crop'][1].iterdir():
            if f.is_file() and f.suffix!='.onnx': os.link(f, to/f.name)
        (to/'model.onnx').write_bytes(b)
        browser.get(f'{url}apps/{k}/index.html')
        error = browser.execute_async_script('const d = arguments[0]; model.then(() => d("none"), e => d(e instanceof BadInput ? e.message : "other: "+e))')
        assert says[k] in error and not error.startswith('other'), error
        assert browser.find_element('id', 'said').text==error

def said_of(data, way):
    "The file with another way in its metadata, sealed again"
    p = onnx.load_from_string(data)
    onnx.helper.set_model_props(p, {k:json.dumps(v) for k,v in {**metadata_of(p), 'pipeline':way}.items()})
    return sealed_bytes(p)

def test_masks_in_the_page(root, url, browser):
    set_seed(0)
    def get_y(f): return (np.asarray(Image.open(f).convert('L'))>90).astype('uint8')
    block = DataBlock((ImageBlock,MaskBlock(['paper','ink'])), get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(.3, seed=0), item_tfms=Resize(24, method='squish'))
    learn = quiet(Learner(block.dataloaders(root/'pics', bs=8, num_workers=0, device='cpu'), nn.Conv2d(3, 2, 3, padding=1), path=root))
    learn.export_app('mask', page=web)
    browser.get(f'{url}mask/index.html')
    assert browser.execute_async_script('const d = arguments[0]; model.then(check).then(d, e => d(String(e)))')==[True]*3
