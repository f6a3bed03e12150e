"What an app answers, against the Learner that it is from, and how fast: `python -m benchmarks.ship --data ../shared/data`"
from __future__ import annotations
import fastquant.all, subprocess, tempfile
from time import perf_counter
from torchvision.models import resnet18
from fastquant.app.predict import Model
from fastquant.app.prepare import prepare_picture
from tests.helpers.browser import chromium_at, served
from .common import *

sections = Registry('section')
modes = dict(RGB='jpg', L='png', P='png', RGBA='png', CMYK='jpg', LA='png')

def photos(o, folder, n=500):
    "CIFAR-10 pictures enlarged to all sizes, in all modes, and turned by what EXIF says"
    rng = np.random.default_rng(0)
    with np.load(o.data/'cifar10_jpeg.npz') as f: jpegs = {k:f[f'test_{k}'] for k in ('jpeg','offset','label')}
    for i in range(n):
        mode,ext = list(modes.items())[i%len(modes)]
        size = np.exp(rng.uniform(np.log(8), np.log(900), 2)).astype(int)
        im = Image.fromarray(decode(jpegs, i*len(jpegs['label'])//n)).resize(size, Image.BICUBIC)
        if mode in ('RGBA','LA'): im.putalpha(Image.fromarray(rng.integers(0, 256, size[::-1], dtype=np.uint8)))
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        im.convert(mode).save(folder/f'{i:03d}.{ext}', exif=exif)

def small_net(): return nn.Sequential(ConvLayer(3, 32, stride=2), ConvLayer(32, 64, stride=2), ConvLayer(64, 64, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

def classes_of_cifar(o, folder, n=1000):
    "Pictures to train on, by class"
    with np.load(o.data/'cifar10_jpeg.npz') as f: jpegs = {k:f[f'train_{k}'] for k in ('jpeg','offset','label')}
    for i in spread(len(jpegs['label']), n):
        to = folder/str(jpegs['label'][i])
        to.mkdir(parents=True, exist_ok=True)
        Image.fromarray(decode(jpegs, i)).save(to/f'{i}.png')

def app_learner(folder, item_tfms, batch_tfms=(), model=None, epochs=5):
    set_seed(0)
    dls = ImageDataLoaders.from_folder(folder/'train', valid_pct=.2, seed=0, item_tfms=item_tfms, batch_tfms=[*batch_tfms,Normalize.from_stats(*imagenet_stats)], bs=32, num_workers=0, device='cpu')
    learn = Learner(dls, model or small_net(), path=folder)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 3e-3)
    return learn

ways = dict(crop=[Resize(64)], squish=[Resize(64, method='squish')], pad_zeros=[Resize(64, method='pad', pad_mode='zeros')], pad_border=[Resize(64, method='pad', pad_mode='border')],
    pad_reflection=[Resize(64, method='pad')], random_resized_crop=[RandomResizedCrop(64)], crop_pad=[CropPad(64)], presizing=[Resize(96)])

def against_learner(folder, app, q, files):
    "Shares of pictures with the same pixels, and with the same class"
    model = Model(app/'model.onnx')
    theirs, = first_batch(q, files)
    std = np.float32(model.way['input']['steps'][-1]['std'])[:,None,None]
    mine = [prepare_picture(f, model.way['input']) for f in files]
    near = [np.abs(x-t).max(initial=0, where=np.isfinite(t))<=1/255/std.max() for x,t in zip(mine, theirs)]
    with q.no_bar(): p,_ = q.get_preds(dl=q.dls.test_dl(files, num_workers=0))
    same = [next(iter(model(f)))==q.dls.vocab[i] for f,i in zip(files, p.argmax(1))]
    return 100*np.mean(near),100*np.mean(same)

def learners(o, folder, names):
    "For each way to make pictures as large as a model wants them: its name, a Learner in int8, and photos"
    (folder/'photos').mkdir()
    photos(o, folder/'photos', o.some(500, 60))
    classes_of_cifar(o, folder/'train', o.some(1000, 200))
    files = sorted((folder/'photos').iterdir())
    for k in names:
        learn = app_learner(folder, ways[k], aug_transforms(size=64, min_scale=.75) if k=='presizing' else (), epochs=o.some(5, 1))
        with learn.no_bar(): q = learn.quantize(timed=False)
        yield k,q,files

def first_batch(q, files): return [to_np(t) for t in q.dls.test_dl(files, bs=len(files), num_workers=0).one_batch()[:1]]

@sections
def same(o):
    rows = []
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        for k,q,files in learners(o, folder, ways):
            pixels,classes = against_learner(folder, q.export_app(k), q, files)
            rows.append(dict(way=k, pictures=len(files), same_pixels=round(pixels, 2), same_class=round(classes, 2)))
    least = {k:min(r[k] for r in rows) for k in ('same_pixels','same_class')}
    return rows, [target('pictures with the pixels of the Learner, the worst way (%)', least['same_pixels'], 99.5, 100),
        target('pictures with the class of the Learner, the worst way (%)', least['same_class'], 99.5, 100)]

# The same in a browser

asked = """
const [names, done] = arguments, out = []
;(async () => {
  await model
  for (const n of names) {
    const blob = await (await fetch(n)).blob(), o = await answer(new File([blob], n, {type: blob.type}))
    out.push({x: [...o.x.a], first: o.said[0][0], ms: o.ms})
  }
  return out
})().then(done, e => done(String(e)))"""

def in_browser(folder, name, files):
    "What the page of the app `name` makes of `files`"
    with served(folder) as url, chromium_at(f'{url}{name}/index.html') as b:
        found = []
        for i in range(0, len(files), 20): found += b.execute_async_script(asked, [f'../{f.relative_to(folder)}' for f in files[i:i+20]])
    return found

@sections
def page(o):
    rows = []
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        for k,q,files in learners(o, folder, ('crop','squish','pad_reflection','presizing')):
            q.export_app(k, page=o.packages/'onnxruntime-web')
            found = in_browser(folder, k, files)
            theirs, = first_batch(q, files)
            with q.no_bar(): p,_ = q.get_preds(dl=q.dls.test_dl(files, num_workers=0))
            std = np.float32(imagenet_stats[1])[:,None,None]
            near = [(np.abs(np.float32(f['x']).reshape(t.shape)-t)*std).max()<=1.001/255 for f,t in zip(found, theirs)]
            same = [f['first']==q.dls.vocab[i] for f,i in zip(found, p.argmax(1))]
            rows.append(dict(way=k, pictures=len(files), same_pixels=round(100*np.mean(near), 2), same_class=round(100*np.mean(same), 2)))
    least = {k:min(r[k] for r in rows) for k in ('same_pixels','same_class')}
    return rows, [target('in Chromium: pictures with the pixels of the Learner, the worst way (%)', least['same_pixels'], 98, 99.5),
        target('in Chromium: pictures with the class of the Learner, the worst way (%)', least['same_class'], 99, 100)]

# Times

by_learner = "import sys, time; from fastai.vision.all import *; print(load_learner(sys.argv[1]).predict(sys.argv[2])[0])"

def seconds(*args, n=5, **kwargs):
    "The median time of a program, and what it prints"
    found = []
    for _ in range(n):
        t = perf_counter()
        r = subprocess.run([*map(str, args)], capture_output=True, text=True, check=True, **kwargs)
        found.append(perf_counter()-t)
    return sorted(found)[n//2],r.stdout

def folder_size(d, *names): return sum(f.stat().st_size for f in d.rglob('*') if f.is_file() and (not names or f.relative_to(d).parts[0] in names))

@per_processor
@sections
def times(o):
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        classes_of_cifar(o, folder/'train', 60)
        learn = app_learner(folder, [Resize(224)], model=resnet18(num_classes=10), epochs=1)
        with learn.no_bar(): app = learn.quantize(timed=False).export_app('app')
        learn.export('learner.pkl')
        pic = learn.dls.valid_ds.items[0]
        start = perf_counter()
        subprocess.run([sys.executable, '-m', 'venv', folder/'env'], check=True)
        py = folder/'env'/'bin'/'python'
        subprocess.run([py, '-m', 'pip', 'install', '-q', '-r', app/'requirements.txt'], check=True, env={k:v for k,v in os.environ.items() if k!='PYTHONPATH'})
        subprocess.run([py, app/'predict.py', pic], check=True, capture_output=True)
        fresh = perf_counter()-start
        clean = {k:v for k,v in os.environ.items() if k!='PYTHONPATH'}
        mine,_ = seconds(py, app/'predict.py', pic, n=o.some(7, 3), env=clean)
        theirs,_ = seconds(sys.executable, '-c', by_learner, folder/'learner.pkl', pic, n=o.some(5, 3))
        site = next((folder/'env'/'lib').iterdir())/'site-packages'
        size = folder_size(site)-folder_size(site, 'pip', 'setuptools')
    row = dict(net='resnet18, 224 px, int8', fresh_environment_s=round(fresh, 1), predict_py_s=round(mine, 3), load_learner_s=round(theirs, 3), installed_mb=round(size/1e6, 1))
    return [row], [target('fresh environment: from nothing to an answer (s)', fresh, 60, 30, 1), target('times faster to the answer than load_learner and predict', theirs/mine, 5, 10, 1),
        target('installed, without the model (MB)', size/1e6, 150, 100, 1)]

if __name__=='__main__': run(sections, 'ship')
