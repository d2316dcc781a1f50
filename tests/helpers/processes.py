"""Start Python as a fork of a process that has imported torch, which takes longer than most runs.

    install()    subprocess.Popen then forks where it would start this Python, on Linux

Each process that may start others has a server, a child that only imports and forks. What
it forks becomes the child of the process that asked, by double forking, and runs the script on top
of an otherwise empty stack, so that it ends as any other Python does. The script's own
subprocess.Popen forks likewise. A command that sets an option of Python, preexec_fn, or a variable
that a module reads when it is imported starts a process of the usual kind.
"""

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading

MODULES = (
    'torch._dynamo',
    'torch.distributed.checkpoint',
    'torch.distributed.fsdp',
    'torch.distributed.run',
    'torch.distributed.tensor',
    'numba',
)
READ_AT_IMPORT = ('LD_', 'NUMBA_', 'PYTHON', 'TORCHINDUCTOR_', 'TRITON_')
PR_SET_CHILD_SUBREAPER = 36
UsualPopen = subprocess.Popen


class Popen(UsualPopen):
    server, lock = None, threading.Lock()

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more):
        environment = dict(os.environ if env is None else env)
        command = [args] if isinstance(args, (str, bytes)) else [os.fspath(word) for word in args]
        unbuffered = command[1:2] == ['-u']
        words = command[1 + unbuffered :]
        if (
            command[0] != sys.executable
            or not words
            or (words[0][:1] == '-' and words[0] not in ('-c', '-m'))
            or executable
            or preexec_fn
            or pass_fds
            or read_at_import(environment) != read_at_import(os.environ)
        ):
            common = args, executable, preexec_fn, close_fds, pass_fds, cwd, env
            return super()._execute_child(*common, *more)
        pipes = more[3:9]  # standard input, output and error, each with its other end
        streams = [end if end != -1 else i for i, end in enumerate((pipes[0], pipes[3], pipes[5]))]
        request = dict(words=words, env=environment, cwd=cwd and os.fspath(cwd))
        request.update(new_session=bool(more[14]), unbuffered=unbuffered)
        try:
            with self.lock:
                if Popen.server is None:
                    Popen.server = new_server()
                socket.send_fds(Popen.server, [json.dumps(request).encode()], streams)
                self.pid = int(Popen.server.recv(100))
        finally:
            self._close_pipe_fds(*pipes)
        self._child_created = True


def read_at_import(environment):
    names = (name for name in environment if name.startswith(READ_AT_IMPORT))
    return {name: environment[name] for name in names if environment[name]}


def install():
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # an orphan of the server's is ours
        subprocess.Popen = Popen


def new_server():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        UsualPopen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
    return ours


def serve(server):
    """Fork for every request, and return it in the new process. End with the process that asks."""
    while True:
        message, streams, _, _ = socket.recv_fds(server, 1 << 18, 3)
        if not message:
            os._exit(0)
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid == 0:
                break
            os.write(writer, b'%d' % pid)
            os._exit(0)
        os.waitpid(between, 0)  # from here on its child is that of the process that asked
        server.send(os.read(reader, 100))
        for number in (reader, writer, *streams):
            os.close(number)
    for i, number in enumerate(streams):
        os.dup2(number, i)
    for number in (reader, writer, *streams):
        os.close(number)
    server.close()
    return json.loads(message)


def run(words, env, cwd, new_session, unbuffered):
    """What `python words` does."""
    if new_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd or os.curdir)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(line_buffering=unbuffered)
    if 'OMP_NUM_THREADS' in env:
        sys.modules['torch'].set_num_threads(int(env['OMP_NUM_THREADS']))
    script = words[0]
    sys.argv = words[words[0] == '-m' :]
    places = {'-c': '', '-m': os.getcwd()}
    sys.path[0] = places.get(script, os.path.dirname(os.path.abspath(script)))
    if script == '-c':
        del sys.argv[1]
        exec(compile(words[1], '<string>', 'exec'), {'__name__': '__main__'})
    elif script == '-m':
        sys.modules.pop(words[1], None)  # runpy warns of a module that is there
        runpy.run_module(words[1], run_name='__main__', alter_sys=True)
    else:
        runpy.run_path(script, run_name='__main__')


def main(server):
    subprocess.Popen = Popen  # now: torch's modules take theirs from there when they are imported
    for name in MODULES:
        importlib.import_module(name)
    sys.modules['numba'].njit(lambda x: x)(1)  # loads what the first function of a process needs
    gc.freeze()  # what is not looked at by the collector is not copied
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        request = serve(server)
        Popen.server, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if os.fork():
            server.close()
            break
        Popen.server.close()  # this process is the server of the one that it was forked from
        nothing = os.open(os.devnull, os.O_RDWR)
        for i in range(3):
            os.dup2(nothing, i)
        os.close(nothing)
    install()
    return request


if __name__ == '__main__':
    run(**main(socket.socket(fileno=int(sys.argv[1]))))
