"Writing a file: links, modes, special files, long names, two writers, killed writers, folders and disks that do not take it"
import os, resource, signal, stat, subprocess, sys, threading
import pytest
from fastquant.core.basics import check_writable, write_whole

def names(d): return sorted(o.name for o in d.iterdir())

@pytest.mark.parametrize('target', ['there','not yet'])
def test_links_are_followed(tmp_path, target):
    (tmp_path/'a').mkdir()
    if target=='there': (tmp_path/'a'/'m').write_bytes(b'old')
    (tmp_path/'one').symlink_to('a/m')
    (tmp_path/'two').symlink_to('one')
    assert write_whole(tmp_path/'two', b'new')==tmp_path/'two'
    assert os.readlink(tmp_path/'two')=='one' and os.readlink(tmp_path/'one')=='a/m' and (tmp_path/'a'/'m').read_bytes()==b'new'
    assert names(tmp_path)==['a','one','two'] and names(tmp_path/'a')==['m']

def fifo(f): os.mkfifo(f)
def device(f): f.symlink_to('/dev/null')
def socket(f):
    import socket
    socket.socket(socket.AF_UNIX).bind(str(f))
def folder(f): f.mkdir()
def link_to_folder(f): f.symlink_to('.')
def loop(f): f.symlink_to(f.name)
def nowhere(f): f.symlink_to('no/such/folder')

@pytest.mark.parametrize('make', [fifo,device,socket,folder,link_to_folder,loop,nowhere], ids=lambda f: f.__name__)
def test_what_is_no_file_is_left_alone(tmp_path, make):
    f = tmp_path/'x'
    make(f)
    before = f.lstat()
    for write in (check_writable, lambda f: write_whole(f, b'new')):
        with pytest.raises(OSError, match="fname='.*x'"): write(f)
    assert names(tmp_path)==['x'] and (f.lstat().st_ino,f.lstat().st_mode)==(before.st_ino,before.st_mode)

@pytest.mark.parametrize('mode', [0o600,0o640,0o755])
def test_mode_stays(tmp_path, mode):
    f = tmp_path/'x'
    f.write_bytes(b'old')
    f.chmod(mode)
    write_whole(f, b'new')
    assert stat.S_IMODE(f.stat().st_mode)==mode and f.read_bytes()==b'new'

def test_a_new_file_gets_the_usual_mode(tmp_path):
    before = os.umask(0o027)
    try: assert stat.S_IMODE(write_whole(tmp_path/'x', b'').stat().st_mode)==0o640
    finally: os.umask(before)

@pytest.mark.skipif(os.geteuid()==0, reason='root may write anything')
def test_read_only(tmp_path):
    f = write_whole(tmp_path/'x', b'old')
    f.chmod(0o400)
    with pytest.raises(PermissionError, match='is read-only'): write_whole(f, b'new')
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match='cannot be written to'): write_whole(tmp_path/'y', b'new')
    tmp_path.chmod(0o700)
    assert f.read_bytes()==b'old' and names(tmp_path)==['x']

def test_long_names(tmp_path):
    for name in ('n'*255, 'é'*127): assert write_whole(tmp_path/name, b'x').read_bytes()==b'x'
    with pytest.raises(OSError): write_whole(tmp_path/('n'*256), b'x')
    assert len(names(tmp_path))==2

def test_two_threads_do_not_meet(tmp_path):
    failed,f = [],tmp_path/'x'
    def write(b):
        for _ in range(40):
            try: write_whole(f, b)
            except OSError as e: failed.append(e)
    threads = [threading.Thread(target=write, args=(c*100_000,)) for c in (b'a',b'b',b'c')]
    for t in threads: t.start()
    while any(t.is_alive() for t in threads):
        if f.exists(): assert len(set(b:=f.read_bytes()))==1 and len(b)==100_000
    assert not failed and names(tmp_path)==['x']

program = '''
import os, sys
from fastquant.core.basics import write_whole
if sys.argv[2]=='die': os.fsync = lambda fd: os.kill(os.getpid(), 9)
for i in range(int(sys.argv[3])): write_whole(sys.argv[1], sys.argv[4].encode()*50_000)
'''
def other(f, how, n, c): return subprocess.Popen([sys.executable,'-c',program,str(f),how,str(n),c])

def test_processes(tmp_path):
    "Two at once, and one that is killed while it writes: its litter goes with the next file, and what a living one writes stays"
    f = write_whole(tmp_path/'x', b'old')
    dead = other(f, 'die', 1, 'd')
    assert dead.wait()==-signal.SIGKILL and f.read_bytes()==b'old' and len(names(tmp_path))==2
    both = [other(f, 'live', 40, c) for c in 'ab']
    assert [p.wait() for p in both]==[0,0]
    assert set(f.read_bytes()) in ({ord('a')},{ord('b')}) and f.stat().st_size==50_000 and names(tmp_path)==['x']

def test_a_full_disk_loses_nothing(tmp_path):
    "A limit on the size of files fails like a full disk does: in the middle"
    f = write_whole(tmp_path/'x', b'old')
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000,hard))
    try:
        with pytest.raises(OSError): write_whole(f, b'n'*5000)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft,hard))
    assert f.read_bytes()==b'old' and names(tmp_path)==['x']

def test_it_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    done = []
    for name in ('fsync','replace'):
        def noted(*args, do=getattr(os, name), name=name):
            done.append(name)
            return do(*args)
        monkeypatch.setattr(os, name, noted)
    write_whole(tmp_path/'x', b'new')
    assert done==['fsync','replace','fsync']
