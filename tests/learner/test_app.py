"`Learner.export_app`: what the folder answers without torch, fastai or fastquant, and what it says to what it cannot read"
import json, os, re, shutil, subprocess, sys
import numpy as np, onnx, pandas as pd, pytest
from fastai.tabular.all import Categorify, FillMissing, Normalize, TabularDataLoaders, tabular_learner
from fastai.vision.all import (BBoxBlock, BBoxLblBlock, BCEWithLogitsLossFlat, Callback, CategoryBlock, ConvLayer, CropPad, DataBlock, Image,
    ImageBlock, ImageDataLoaders, ItemTransform,
    Learner, MaskBlock, MultiCategoryBlock, PILImage, PILImageBW, PointBlock, RandomResizedCrop, RandomSplitter, RatioResize, RegressionBlock,
    Resize, aug_transforms, get_image_files, imagenet_stats, nn, noop, parent_label, set_seed)
from fastquant.all import *
from fastquant.app.predict import Model
from fastquant.app.prepare import BadInput, prepare_picture
from fastquant.export.intact import metadata_of, sealed_bytes
from fastquant.learner.pipeline import pipeline_of
from ..helpers.data import digits
from ..helpers.learners import quiet
from ..helpers.photos import huge_png, interlaced_png

blocker = '''
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch','fastai','fastcore','fastquant','onnx','pandas','torchvision'): raise ImportError(f'{name} is not to be imported')
sys.meta_path.insert(0, Blocked())
'''

def program(app, *args, cwd=None):
    "`python predict.py *args`, where none of our libraries can be imported"
    code = f"{blocker}\nimport runpy; sys.argv = ['predict.py', *{[*map(str, args)]!r}]; sys.path[0] = {str(app)!r}; runpy.run_path({str(app/'predict.py')!r}, run_name='__main__')"
    env = {k:v for k,v in os.environ.items() if k!='PYTHONPATH'}
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=cwd or app, env=env)

def picture(i, size, mode='RGB'):
    "A digit as a picture of `size`, in colours of its own"
    grey = Image.fromarray((digits.images[i]*15.9).astype('uint8')).resize(size, Image.BICUBIC)
    noise = Image.fromarray(np.random.default_rng(i).integers(0, 60, (*size[::-1],3), dtype=np.uint8))
    rgb = Image.blend(Image.merge('RGB', [grey]*3), noise, .3)
    if mode!='RGBA': return rgb.convert(mode)
    rgb.putalpha(grey)
    return rgb

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "Sixty digits as files of all sizes"
    to = tmp_path_factory.mktemp('app')
    for i in range(60):
        f = to/'pics'/str(digits.target[i]%3)/f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        picture(i, (20+i%17,20+i%11)).save(f)
    return to

def net(n_out, c=3): return nn.Sequential(ConvLayer(c, 8, stride=2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, n_out))

def learner(root, y=CategoryBlock, get_y=parent_label, n_out=3, item_tfms=None, x=ImageBlock, get_x=None, model=None, batch_tfms=None, **kwargs):
    set_seed(0)
    tfms = dict(item_tfms=item_tfms or Resize(24), batch_tfms=batch_tfms)
    block = DataBlock((x,y), get_items=get_image_files, get_x=get_x, get_y=get_y, splitter=RandomSplitter(.3, seed=0), **tfms)
    dls = block.dataloaders(root/'pics', bs=8, num_workers=0, device='cpu')
    return quiet(Learner(dls, model or net(n_out), path=root, **kwargs))

@pytest.fixture(scope='module')
def app(root):
    "An int8 app, and the Learner that it is from"
    learn = learner(root, batch_tfms=[*aug_transforms(size=20, min_scale=.75), Normalize.from_stats(*imagenet_stats)])
    with learn.no_bar():
        learn.fit(2, 1e-2)
        q = learn.quantize(timed=False)
    return q,q.export_app('app')

def test_nothing_but_numpy_pillow_and_onnxruntime(app):
    q,to = app
    r = program(to, '--check')
    assert r.returncode==0 and r.stdout.count('the same as')==3 and 'NOT' not in r.stdout, r.stderr
    assert program(to, 'examples').stdout.count('.png: ')==3
    assert {f.name for f in to.iterdir()}=={'model.onnx','predict.py','requirements.txt','README.md','examples'}
    assert all(k in (to/'README.md').read_text() for k in ('pip install -r requirements.txt', 'predict.py --check', 'pip install --no-compile'))

# What the program makes of pictures, against the Learner's own data

modes = 'RGB','L','P','RGBA','CMYK','1','LA'
formats = dict(CMYK='jpg', RGB='jpg', LA='png')

def all_kinds(folder, n):
    "Pictures of all sizes and modes, and one that EXIF would turn"
    folder.mkdir(exist_ok=True)
    sizes = [(24,24),(1,1),(2,90),(90,2),(24,60),(61,24),(13,17),(200,150)]
    for i in range(n):
        mode = modes[i%len(modes)]
        f = folder/f'{i}.{formats.get(mode, "png")}'
        im,exif = picture(i, sizes[i%len(sizes)], mode),Image.Exif()
        exif[0x0112] = 1+i%8
        im.save(f, exif=exif)
        yield f

ways = dict(crop=[Resize(24)], pad=[Resize((20,28), method='pad')], zeros=[Resize(24, method='pad', pad_mode='zeros')],
    border=[Resize(24, method='pad', pad_mode='border')], squish=[Resize((28,20), method='squish')], crop_pad=[CropPad(24, pad_mode='border')],
    random=[RandomResizedCrop(24)], two=[RatioResize(32), CropPad(24)])

@pytest.mark.parametrize('name', ways)
def test_pixels_are_those_of_the_learner(name, root):
    files = list(all_kinds(root/'kinds', 56))
    if name=='two': files = [f for f in files if min(Image.open(f).size)>=13] # fastai has no pixels of the others
    learn = learner(root, item_tfms=ways[name], x=ImageBlock(PILImageBW) if name=='squish' else ImageBlock)
    way = pipeline_of(learn)['input']
    theirs, = learn.dls.test_dl(files, bs=len(files), num_workers=0).one_batch()
    near = [np.abs(prepare_picture(f, way)-x.numpy()).max()<=1/255 for f,x in zip(files, theirs)]
    assert np.mean(near)>=.995, [f.name for f,ok in zip(files, near) if not ok]

exact = dict(lossless=True, exact=True)

def test_transparent_and_interlaced_pictures(root):
    "Colours below what is transparent count, as they do for the Learner"
    (root/'odd').mkdir()
    rng = np.random.default_rng(0)
    for c in 2,3,4: (root/'odd'/f'{c}.png').write_bytes(interlaced_png(rng.integers(0, 256, (33,47,c), dtype=np.uint8)))
    for k,c,how in ('a',3,exact),('b',4,exact),('c',4,dict(quality=50)):
        Image.fromarray(rng.integers(0, 256, (33,47,c), dtype=np.uint8)).save(root/'odd'/f'{k}.webp', **how)
    files = sorted((root/'odd').iterdir())
    learn = learner(root)
    theirs, = learn.dls.test_dl(files, bs=len(files), num_workers=0).one_batch()
    for f,x in zip(files, theirs): assert np.abs(prepare_picture(f, pipeline_of(learn)['input'])-x.numpy()).max()<=1/255, f.name

def test_classes_are_those_of_the_learner(app, root):
    q,to = app
    files = list(all_kinds(root/'kinds', 56))
    with q.no_bar(): p,_ = q.get_preds(dl=q.dls.test_dl(files, num_workers=0))
    model = Model(to/'model.onnx')
    mine = [model(f) for f in files]
    assert [list(m)[0] for m in mine]==[q.dls.vocab[i] for i in p.argmax(1)]
    for m,t in zip(mine, p): assert np.allclose(sorted(m.values()), np.sort(t), atol=1e-3) and list(m.values())==sorted(m.values(), reverse=True)

def test_what_a_model_takes(app, root):
    model,f = Model(app[1]/'model.onnx'),root/'kinds'/'0.jpg'
    assert model(f)==model(str(f))==model(Image.open(f))==model(np.asarray(Image.open(f)))

# What else a model answers

def as_app(learn, name): return learn.export_app(name)

def test_labels(root):
    learn = learner(root, MultiCategoryBlock, lambda f: [parent_label(f),'any'], 4, model=net(4), loss_func=BCEWithLogitsLossFlat(thresh=.3))
    to = as_app(learn, 'labels')
    f = learn.dls.valid_ds.items[0]
    with learn.no_bar(): _,on,p = learn.predict(f)
    assert set(Model(to/'model.onnx')(f))=={v for v,o in zip(learn.dls.vocab, on) if o}
    assert program(to, '--check').returncode==0

def test_mask(root):
    def get_y(f): return (np.asarray(Image.open(f).convert('L'))>90).astype('uint8')
    body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    learn = learner(root, MaskBlock(['paper','ink']), get_y, model=body, item_tfms=Resize(24, method='squish'))
    to = as_app(learn, 'mask')
    f = shutil.copy(learn.dls.valid_ds.items[0], root/'one.png')
    with learn.no_bar(): theirs = learn.predict(f)[0]
    assert (Model(to/'model.onnx')(f)==theirs.numpy()).all()
    r = program(to, '--check', f)
    assert r.returncode==0 and (np.asarray(Image.open(root/'one.mask.png'))==theirs.numpy()).all(), r.stderr

def test_points(root):
    learn = learner(root, PointBlock, lambda f: [[3.,4.],[5.,6.]], model=net(4))
    to = as_app(learn, 'points')
    f = learn.dls.valid_ds.items[0]
    with learn.no_bar(): theirs = learn.predict(f)[0]
    assert np.allclose(Model(to/'model.onnx')(f), theirs.numpy(), atol=1e-3)

def test_numbers(root):
    learn = learner(root, RegressionBlock, lambda f: float(parent_label(f)), model=net(1))
    f = learn.dls.valid_ds.items[0]
    with learn.no_bar(): theirs = learn.predict(f)[2]
    assert np.allclose(list(Model(as_app(learn, 'numbers')/'model.onnx')(f).values()), theirs.numpy(), atol=1e-4)

def test_pictures_that_a_table_names(root):
    df = pd.DataFrame([dict(name=str(f.relative_to(root)), label=f'is {parent_label(f)}') for f in sorted((root/'pics').rglob('*.png'))])
    dls = ImageDataLoaders.from_df(df, root, valid_pct=.3, seed=1, bs=8, num_workers=0, device='cpu', item_tfms=Resize(24))
    to = as_app(quiet(Learner(dls, net(3), path=root)), 'named')
    assert set(Model(to/'model.onnx')(root/df.name[0]))==set(dls.vocab) and program(to, '--check').returncode==0

# A table

@pytest.fixture(scope='module')
def table(root):
    rng = np.random.default_rng(0)
    df = pd.DataFrame(dict(cat=rng.choice(list('abc'), 80), n=rng.integers(1, 5, 80), age=rng.normal(40, 9, 80), pay=rng.normal(0, 1, 80)))
    df['y'] = np.where(df.age>40, 'yes', 'no')
    df.loc[::7, 'age'] = np.nan
    df.loc[3::9, 'cat'] = None
    dls = TabularDataLoaders.from_df(df, procs=[Categorify, FillMissing, Normalize], cat_names=['cat','n'], cont_names=['age','pay'], y_names='y',
        valid_idx=list(range(0, 80, 3)), bs=8, device='cpu')
    set_seed(0)
    learn = quiet(tabular_learner(dls, layers=[8], path=root))
    with learn.no_bar(): learn.fit(2, 1e-2)
    return learn,as_app(learn, 'table'),df

def test_table(table):
    learn,to,df = table
    rows = df.drop(columns='y').astype(object).where(df.notna(), None)
    with learn.no_bar(): p,_ = learn.get_preds(dl=learn.dls.test_dl(df.copy()))
    model = Model(to/'model.onnx')
    mine = [model(r) for r in rows.to_dict('records')]
    assert np.allclose([[m[v] for v in learn.dls.vocab] for m in mine], p.numpy(), atol=1e-4)
    assert program(to, '--check', 'examples/rows.csv').stdout.count('row ')==6

@pytest.mark.parametrize('cats,conts', [(['cat'], []), ([], ['pay'])])
def test_a_table_of_one_kind(cats, conts, table, root):
    dls = TabularDataLoaders.from_df(table[2], procs=[Categorify, FillMissing, Normalize], cat_names=cats, cont_names=conts, y_names='y',
        valid_idx=list(range(0, 80, 3)), bs=8, device='cpu')
    to = as_app(quiet(tabular_learner(dls, layers=[8], path=root)), f'of {cats+conts}')
    assert set(Model(to/'model.onnx')(dict(cat='a', pay='1')))=={'no','yes'}

@pytest.mark.parametrize('text,says,rc', [('cat,n,age,pay,new\na,1,4,5,6\nz,1,,5,6\n', "not used: new.*'z' was not in the training data", 0), ('cat,n,age\na,1,4\n', 'missing columns: pay', 1),
    ('cat,n,age,pay\na,1,4,\n', "'pay' has no value", 1), ('cat,n,age,pay\na,1,old,1\n', "'old' is no number", 1), ('', 'has no rows', 1), ('\0\0\xff', 'no', 1)])
def test_what_is_wrong_with_a_table(text, says, rc, table, tmp_path):
    (tmp_path/'t.csv').write_bytes(text.encode('latin-1'))
    r = program(table[1], tmp_path/'t.csv')
    assert r.returncode==rc and re.search(says, r.stderr, re.S) and 'Traceback' not in r.stderr, r.stderr

# Bad input

def test_what_is_wrong_with_a_picture(app, tmp_path):
    whole = app[1]/'examples'/'1.png'
    (tmp_path/'a_short.png').write_bytes(whole.read_bytes()[:400])
    (tmp_path/'b_text.png').write_text('no picture')
    (tmp_path/'c_none.png').write_bytes(b'')
    shutil.copy(whole, tmp_path/'d_whole.png')
    (tmp_path/'e_huge.png').write_bytes(huge_png())
    r = program(app[1], tmp_path, tmp_path/'gone.jpg', app[1]/'README.md', app[1]/'predict.py')
    assert r.returncode==1 and 'Traceback' not in r.stderr and r.stdout.startswith(str(tmp_path/'d_whole.png')), r.stderr
    assert r.stdout.count('\n')==1 and len(r.stderr.splitlines())==7
    for says in 'damaged or cut short','pixels, which is too large','is no picture that Pillow can read','there is no such file': assert says in r.stderr

def test_what_is_wrong_with_a_picture_that_is_open(app, tmp_path):
    (tmp_path/'short.png').write_bytes((app[1]/'examples'/'1.png').read_bytes()[:400])
    for bad in Image.open(tmp_path/'short.png'),(tmp_path/'short.png').read_bytes():
        with pytest.raises(BadInput, match='This is damaged or cut short'): Model(app[1]/'model.onnx')(bad)

def test_what_is_wrong_with_a_model(app, tmp_path):
    data = (app[1]/'model.onnx').read_bytes()
    for k,bad in dict(flipped=data[:len(data)//2]+bytes([data[len(data)//2]^1])+data[len(data)//2+1:], short=data[:-20], empty=b'', other=b'\x08\x07').items():
        (tmp_path/f'{k}.onnx').write_bytes(bad)
        with pytest.raises(BadInput, match='damaged'): Model(tmp_path/f'{k}.onnx')

def changed(app, **said):
    "The file with other metadata, sealed again"
    p = onnx.load_from_string((app[1]/'model.onnx').read_bytes())
    facts = {**metadata_of(p), **said}
    onnx.helper.set_model_props(p, {k:json.dumps(v) for k,v in facts.items()})
    return sealed_bytes(p)

@pytest.mark.parametrize('way,says', [(dict(version=3), 'made by a newer fastquant'), (dict(version=1, cannot='Blur acts.'), 'Blur acts.'), (None, 'export it again'),
    (dict(version=1, input=dict(kind='picture', mode='RGB', steps=[dict(op='blur')]), output={}), 'export it again')])
def test_a_way_that_is_not_known(way, says, app, tmp_path):
    (tmp_path/'m.onnx').write_bytes(changed(app, pipeline=way))
    with pytest.raises(BadInput, match=says): Model(tmp_path/'m.onnx')

# What is refused, with nothing written

class Blur(ItemTransform):
    "A transform of somebody's own"
    def encodes(self, o): return o

class Brighter(Callback):
    "A callback of somebody's own"
    def before_batch(self): self.learn.xb = (self.x+1,)

def opens(f): return PILImage.create(f).rotate(90)

@pytest.mark.parametrize('how,says', [(dict(item_tfms=[Resize(24), Blur()]), 'Blur acts in validation'), (dict(cbs=Brighter()), 'Brighter acts in validation'),
    (dict(get_x=opens), '`get_x` opens pictures by itself'), (dict(loss_func=lambda p,y: p.mean()), 'loss function <lambda>')])
def test_refused_by_name(how, says, root):
    learn = learner(root, **how)
    before = {f.name for f in root.iterdir()}
    with pytest.raises(ValueError, match=says): learn.export_app('refused')
    assert {f.name for f in root.iterdir()}==before

boxes = [[1,2,9,10],[3,3,8,12]]
several = dict(boxes=((ImageBlock,BBoxBlock,BBoxLblBlock), [lambda f: boxes, lambda f: ['a','b']], 1, '1 input.s. and 2 target.*one input and one target'),
    two=((ImageBlock,CategoryBlock,RegressionBlock), [parent_label, lambda f: 1.], 1, '1 input.s. and 2 target.*one input and one target'),
    inputs=((ImageBlock,ImageBlock,CategoryBlock), [noop, parent_label], 2, '2 input.s. and 1 target.*one input and one target'))

@pytest.mark.parametrize('name', several)
def test_boxes_and_several_targets_are_refused(name, root):
    blocks,get,n_inp,says = several[name]
    dls = DataBlock(blocks, get_items=get_image_files, getters=[noop, *get], n_inp=n_inp, item_tfms=Resize(24)).dataloaders(root/'pics', bs=4, num_workers=0, device='cpu')
    with pytest.raises(ValueError, match=says): quiet(Learner(dls, net(3), loss_func=nn.CrossEntropyLoss(), path=root)).export_app('refused')
    assert not (root/'refused').exists()

def test_folders(app, root):
    q,_ = app
    with pytest.raises(FileExistsError, match='not empty'): q.export_app('app')
    with pytest.raises(FileNotFoundError, match='no folder'): q.export_app('no/app')
    with pytest.raises(FileExistsError, match='no folder'): q.export_app('app/model.onnx')
    (root/'empty').mkdir()
    assert (q.export_app('empty')/'model.onnx').exists()

def test_pages_take_pictures_and_an_engine(app, table):
    for how in dict(gradio=True),dict(page='nowhere'):
        with pytest.raises((ValueError,FileNotFoundError), match='those of `page` pictures|npm install onnxruntime-web'): table[0].export_app('page', **how)
    with pytest.raises(FileNotFoundError, match='npm install onnxruntime-web'): app[0].export_app('page', page='nowhere')

def test_gradio(app, root):
    "The page runs, with something in the place of Gradio that calls it"
    to = app[0].export_app('space', gradio=True)
    stub = '''
import sys, types
seen = {}
class Interface:
    def __init__(self, **k): seen.update(k)
    def launch(self):
        print(seen['fn'](seen['examples'][0]), seen['inputs'])
        try: seen['fn'](None)
        except OSError as e: print(e)
sys.modules['gradio'] = types.SimpleNamespace(Interface=Interface, Image=dict, Label=dict, Error=OSError)
'''
    r = subprocess.run([sys.executable, '-c', f"{blocker}{stub}sys.path[0] = '.'\nimport app"], capture_output=True, text=True, cwd=to)
    assert r.returncode==0 and r.stdout.startswith("{'") and "{'type': 'filepath', 'image_mode': None}" in r.stdout and 'None is no picture' in r.stdout, r.stderr
    assert (to/'README.md').read_text().startswith('---\ntitle: space\nsdk: gradio\napp_file: app.py\n---\n')
