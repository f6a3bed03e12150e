"What an app answers, against the Learner that it is from, and how fast: `python -m benchmarks.ship --data ../shared/data`"
from __future__ import annotations
import fastquant.all, http.client, shutil, subprocess, tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from statistics import median
from time import perf_counter
from importlib.metadata import distributions
from torchvision.models import mobilenet_v2, resnet18
from fastai.text.core import SpacyTokenizer, Tokenizer
from fastquant.app.predict import Model
from fastquant.core.measure import latency, n_bytes
from fastquant.core.outputs import sqnr
from fastquant.export.executorch import Executorch
from fastquant.app.prepare import prepare_picture
from fastquant.app.text import Words, text_rules
from fastquant.learner.text import tables_of
from tests.helpers.browser import chromium_at, served
from .common import *
from .text import newsgroups

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

# Texts

def descriptions():
    "What installed packages say of themselves, in parts of 1,500 characters: addresses, code, tables, other alphabets"
    for text in sorted(d.metadata.get_payload() or '' for d in distributions()):
        yield from (text[i:i+1500] for i in range(0, min(len(text), 15000), 1500))

@sections
def words(o):
    theirs,rows = Tokenizer(SpacyTokenizer()),[]
    mine = Words(json.loads(json.dumps(tables_of(theirs.tok)['spacy'])))
    rules = compose(*(text_rules[f.__name__] for f in theirs.rules))
    (train,_),(test,_) = newsgroups(o)
    for k,texts in dict(newsgroups=train+test, packages=list(descriptions())).items():
        texts = texts[::max(1, len(texts)//o.some(len(texts), 300))]
        start = perf_counter()
        found = [mine(rules(t)) for t in texts]
        between = perf_counter()
        same = 100*np.mean([a==list(theirs(t)) for a,t in zip(found, texts)])
        rows.append(dict(texts=k, n=len(texts), same_tokens=round(same, 3), against_spacy=round((between-start)/(perf_counter()-between), 2)))
    return rows,[target('texts with the tokens of fastai and spaCy, of the worse kind (%)', min(r['same_tokens'] for r in rows), 100, 100)]

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

def installed_bytes(env):
    "What lies in an environment besides pip"
    site = next((env/'lib').iterdir())/'site-packages'
    return folder_size(site)-folder_size(site, 'pip', 'setuptools')

def small_install(env, app, clean):
    "Bytes of an environment made as the README of an app says for little room, after its examples were checked there"
    subprocess.run([sys.executable, '-m', 'venv', env], check=True)
    lines = (app/'README.md').read_text().split('Where room is scarce')[1].splitlines()
    commands = [l.strip() for l in lines if l.startswith('    ')]
    path = dict(clean, PATH=f"{env/'bin'}{os.pathsep}{clean['PATH']}")
    for c in (*commands,'python predict.py --check'): subprocess.run(['bash', '-c', c], cwd=app, env=path, check=True, capture_output=True)
    return installed_bytes(env)

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
        clean = {k:v for k,v in os.environ.items() if k!='PYTHONPATH'}
        start = perf_counter()
        subprocess.run([sys.executable, '-m', 'venv', folder/'env'], check=True)
        py = folder/'env'/'bin'/'python'
        subprocess.run([py, '-m', 'pip', 'install', '-q', '-r', app/'requirements.txt'], check=True, env=clean)
        subprocess.run([py, app/'predict.py', pic], check=True, capture_output=True)
        fresh = perf_counter()-start
        mine,_ = seconds(py, app/'predict.py', pic, n=o.some(7, 3), env=clean)
        theirs,_ = seconds(sys.executable, '-c', by_learner, folder/'learner.pkl', pic, n=o.some(5, 3))
        size,small = installed_bytes(folder/'env'),small_install(folder/'small', app, clean)
    row = dict(net='resnet18, 224 px, int8', fresh_environment_s=round(fresh, 1), predict_py_s=round(mine, 3), load_learner_s=round(theirs, 3), installed_mb=round(size/1e6, 1), small_mb=round(small/1e6, 1))
    return [row], [target('fresh environment: from nothing to an answer (s)', fresh, 60, 30, 1), target('times faster to the answer than load_learner and predict', theirs/mine, 5, 10, 1),
        target('installed, without the model (MB)', size/1e6, 150, 100, 1),
        target('installed as the README says for little room (MB)', small/1e6, 150, 100, 1)]

# Serving

by_app = "import sys; sys.path[:0] = ['.']; from server import *; from predict import *; Server(responder(Model(threads=int(sys.argv[1])), BadInput), int(sys.argv[2]), int(sys.argv[3])).serve_forever()"
by_learner_server = '''import io, sys
from fastai.vision.all import *
sys.path[:0] = ['.']
from server import Server
torch.set_num_threads(int(sys.argv[1]))
learn = load_learner('../learner.pkl')
def respond(body):
    with learn.no_bar(): p = learn.predict(PILImage.create(io.BytesIO(body)))[2]
    return 200,dict(zip(learn.dls.vocab, p.tolist()))
Server(respond, int(sys.argv[2]), int(sys.argv[3])).serve_forever()'''
servers = { # folder, program, threads of an answer, answers at once, processes; a Learner answers one at a time
    'int8, 2 at once':('int8',by_app,1,2,1), 'int8, 2 threads':('int8',by_app,2,1,1), 'float, 2 at once':('float',by_app,1,2,1),
    'load_learner':('float',by_learner_server,1,1,1), 'load_learner, 2 processes':('float',by_learner_server,1,1,2)}

def ask(connection, body):
    "Seconds until the answer is there"
    start = perf_counter()
    connection.request('POST', '/', body)
    r = connection.getresponse()
    r.read()
    assert r.status==200
    return perf_counter()-start

def first_answer(port, body, start):
    "Seconds from `start` until a server that is being started answers"
    while True:
        try: ask(http.client.HTTPConnection('127.0.0.1', port), body)
        except ConnectionError: time.sleep(.005)
        else: return perf_counter()-start

def load(ports, bodies, clients, seconds):
    "Seconds of each answer, of clients that ask again as soon as they have one, and answers in a second"
    def one(k):
        c,found = http.client.HTTPConnection('127.0.0.1', ports[k%len(ports)]),[]
        while perf_counter()<end: found.append(ask(c, bodies[(k+len(found))%len(bodies)]))
        return found
    start = perf_counter()
    end = start+seconds
    with ThreadPoolExecutor(clients) as pool: found = [t for ts in pool.map(one, range(clients)) for t in ts]
    return found,len(found)/(perf_counter()-start)

def peak_memory(p):
    "Bytes that a process has had in memory"
    return 1024*int(re.search(r'VmHWM:\s+(\d+)', Path(f'/proc/{p.pid}/status').read_text())[1])

def computed(ps):
    "Seconds that processes have computed, on whatever core"
    fields = [Path(f'/proc/{p.pid}/stat').read_text().rpartition(')')[2].split() for p in ps]
    return sum(int(f[11])+int(f[12]) for f in fields)/os.sysconf('SC_CLK_TCK')

def larger_photos(o, n=40):
    "CIFAR-10 pictures as JPEGs of 500 x 375"
    with np.load(o.data/'cifar10_jpeg.npz') as f: jpegs = {k:f[f'test_{k}'] for k in ('jpeg','offset','label')}
    for i in range(n):
        out = io.BytesIO()
        Image.fromarray(decode(jpegs, i)).resize((500,375), Image.BICUBIC).save(out, 'jpeg', quality=90)
        yield out.getvalue()

def apps(folder, learn):
    "Apps in int8 and in float with a server, beside the exported Learner"
    with learn.no_bar(): q = learn.quantize(timed=False)
    for l,k in (q,'int8'),(learn,'float'): shutil.copy('examples/server.py', l.export_app(k))
    learn.export('learner.pkl')
    return folder

def started(folder, name, port, body):
    "The processes of a server at ports from `port`, and how long the first took to answer"
    where,code,threads,at_once,n = servers[name]
    env,start = {k:v for k,v in os.environ.items() if not k.startswith('OMP_')},perf_counter()
    found = [subprocess.Popen([sys.executable, '-c', code, *map(str, (threads,port+i,at_once))], cwd=folder/where, env=env) for i in range(n)]
    took = [first_answer(port+i, body, start) for i in range(n)]
    return found,took[0]

def all_started(folder, body, stack, n):
    "Processes of all servers, and how long each of `n` starts took"
    running,first = {},{k:[] for k in servers}
    for i in range(n):
        for port,k in enumerate(servers):
            ps,t = started(folder, k, 8100+100*i+2*port, body)
            first[k].append(t)
            for p in ps: stack.callback(p.kill)
            if i<n-1: [p.kill() for p in ps]
            else: running[k] = 8100+100*i+2*port,ps
    return running,first

@per_processor
@sections
def serving(o):
    bodies,found = list(larger_photos(o)),{(k,c):[] for k in servers for c in (1,4)}
    with tempfile.TemporaryDirectory() as d, ExitStack() as stack:
        folder = Path(d)
        classes_of_cifar(o, folder/'train', 60)
        apps(folder, app_learner(folder, [Resize(224)], model=resnet18(num_classes=10), epochs=1))
        running,first = all_started(folder, bodies[0], stack, o.some(3, 1))
        for _ in range(o.some(7, 1)): # in turns, as others may use the machine
            for (k,c),rounds in found.items():
                port,ps = running[k]
                before = computed(ps)
                times,rate = load(range(port, port+len(ps)), bodies, c, o.some(3, 1))
                rounds.append((times,rate,(computed(ps)-before)/len(times)))
        memory = {k:sum(map(peak_memory, ps)) for k,(_,ps) in running.items()}
    return served_rows(found, first, memory)

def served_rows(found, first, memory):
    "A row for each server and number of clients, and what was to be reached"
    rows = []
    for (k,c),rounds in found.items():
        p50,p99 = (1000*median([np.percentile(ts, q) for ts,*_ in rounds]) for q in (50,99))
        rows.append(dict(server=k, clients=c, per_second=round(median([n for _,n,_ in rounds]), 1), computed_ms=round(1000*median([t for *_,t in rounds]), 1), p50_ms=round(p50, 1), p99_ms=round(p99, 1),
            first_answer_s=round(median(first[k]), 2), peak_mb=round(memory[k]/1e6)))
    app,learner = (next(r for r in rows if r['server']==k and r['clients']==4) for k in ('int8, 2 at once','load_learner'))
    return rows,[target('ResNet-18 at 224 px, 4 clients: answers in a second against load_learner in one process', app['per_second']/learner['per_second'], 3, 5, 1),
        target('the same in seconds that the server computed', learner['computed_ms']/app['computed_ms'], 3, 5, 1)]

@per_processor
@sections
def batches(o):
    "What a picture costs in a batch: in the time that the process computes, so that others do not matter"
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        classes_of_cifar(o, folder/'train', 60)
        apps(folder, app_learner(folder, [Resize(224)], model=resnet18(num_classes=10), epochs=1))
        sessions = {k:Model(folder/k/'model.onnx', threads=1).session for k in ('int8','float')}
    xs,found = {n:np.random.default_rng(0).normal(size=(n,3,224,224)).astype(np.float32) for n in (1,4,16)},{}
    for _ in range(o.some(9, 2)):
        for k,s in sessions.items():
            for n,x in xs.items():
                start = time.process_time()
                for _ in range(16//n): s.run(None, {'input':x})
                found.setdefault((k,n), []).append((time.process_time()-start)/16)
    return [dict(file=k, batch=n, ms_a_picture=round(1000*median(t), 2)) for (k,n),t in found.items()],[]

# Phones

def resnet18_64(): return resnet18(num_classes=10)
def mobilenet_v2_64(): return mobilenet_v2(num_classes=10)
def vision_learner_64(): return create_vision_model(resnet18, 10, pretrained=False) # what `vision_learner` makes

def cifar_64(o):
    "CIFAR-10 at 64 px: training and test set"
    def larger(ds, n):
        x,y = ds[spread(len(ds), n)]
        return TensorDataset(F.interpolate(x, scale_factor=2, mode='bilinear'), y)
    return tuple(larger(ds, o.some(n, 200)) for ds,n in zip(cifar10(o), (8000,2000)))

def in_xnnpack(model, x):
    "The method of a program of the float `model` for `x`, for times to compare with"
    from executorch.exir import to_edge_transform_and_lower
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.runtime import Runtime
    model = deepcopy(model).eval()
    for m in model.modules():
        if isinstance(m, AdaptiveConcatPool2d): m.mp = nn.MaxPool2d(x.shape[-1]//32) # ExecuTorch has no adaptive one
    edge = to_edge_transform_and_lower(torch.export.export(model, (x,)), partitioner=[XnnpackPartitioner()])
    program = Runtime.get().load_program(bytes(edge.to_executorch().buffer))
    return program,program.load_method('forward')

class Kept(Executorch):
    "Keeps the simulation that a program was made of"
    @classmethod
    def write(cls, sim, xb, **how):
        cls.sim = sim
        return super().write(sim, xb, **how)

def on_phone(o, net, data):
    "A row for a trained net in ExecuTorch, against its simulation, ONNX Runtime and float"
    learn,x = learner(train(o, net, data, 4), *data),data[1].tensors[0]
    with learn.no_bar(): q,other = learn.quantize(engine=Kept, timed=False),learn.quantize(timed=False)
    with torch.no_grad(): mine,sim,theirs,floats = (torch.cat([m(b) for b in x.split(50)]) for m in (q.model,Kept.sim,other.model,learn.model.eval()))
    program,method = in_xnnpack(learn.model, x[:1])
    with clock(o): ms = latency({'int8':lambda: q.model(x[:1]), 'float':lambda: method.execute([x[:1]]), 'ort':lambda: other.model(x[:1])})['median']
    def same(other): return round(100*(mine.argmax(1)==other.argmax(1)).float().mean().item(), 2)
    def right(out): return round(100*(out.argmax(1)==data[1].tensors[1]).float().mean().item(), 2)
    r = q.model.report
    about = dict(net=net.__name__.removesuffix('_64'), layers=f'{r.n_int8} of {r.n_layers}', mb=round(len(q.model.data)/1e6, 2), float_mb=round(n_bytes(learn.model)/1e6, 2))
    agrees = dict(top1=right(mine), top1_float=right(floats), db=round(sqnr(sim, mine), 1), same_as_simulation=same(sim), same_as_onnxruntime=same(theirs), same_as_float=same(floats))
    return {**about, **agrees, **{f'{k}_ms':round(v, 2) for k,v in ms.items()}}

@per_processor
@sections
def phone(o):
    data = cifar_64(o)
    rows = [on_phone(o, net, data) for net in (resnet18_64,mobilenet_v2_64,vision_learner_64)]
    least = min(r['same_as_simulation'] for r in rows)
    return rows,[target('ExecuTorch: pictures with the class of the simulation, of the worst net (%)', least, 98, 99.5, 2)]

if __name__=='__main__': run(sections, 'ship')
