"""Rules about the sources: which calls may write a file, and that nothing runs code from a file, a text or a shell."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("lares_fast", "kernels", "benchmarks", "examples")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
SOURCES += [ROOT / "setup.py", ROOT / "conftest.py", ROOT / ".ci" / "choose.py"]

# Methods and functions that write a file, by the last part of their name. ``replacing``, ``atomic_write`` and ``write_text`` of
# lares_fast/_files.py write whole files, with the umask, and follow no link.
WRITERS = {
    "write_bytes",
    "savefig",
    "to_csv",
    "to_parquet",
    "to_json",
    "tofile",
    "savez",
    "savez_compressed",
    "savetxt",
    "dump",
}
WRITERS |= {"save_file", "write_table", "ParquetWriter", "SummaryWriter", "NamedTemporaryFile", "mkstemp", "mktemp"}
WRITERS |= {"copy2", "copyfile", "copyfileobj", "copytree", "move", "rename", "symlink_to", "hardlink_to", "touch", "mkfifo"}
# These write a file if they are attributes of the named module, or of anything for None.
OF = {"save": {"torch", "np", "numpy"}, "dump": {"json", "yaml"}, "replace": {"os"}, "write_text": None, "copy": {"shutil"}}

MAY_WRITE = {
    "lares_fast/_files.py": "it is the writer",
    "lares_fast/train/checkpoint.py: torch.save": "it writes into the file of atomic_write",
    "lares_fast/train/config_file.py: yaml.dump": "it returns a text",
    "lares_fast/cli/plots.py: savefig": "it draws into memory",
    "lares_fast/cli/recommending.py: ParquetWriter": "it writes into the file of replacing",
    "lares_fast/cli/recommending.py: write_table": "it writes into the file of replacing",
    "lares_fast/cli/streams.py: open ?": "it opens the null device",
    "lares_fast/cli/tensorboard.py: SummaryWriter": "TensorBoard writes its events itself, into the folder of the run",
    "lares_fast/gpu_bench/__main__.py: open w": "it is the standard output",
    "benchmarks/gpu/first.py": "it copies and builds the package in a folder that only the current account can write to",
    "benchmarks/plot.py: savefig": "it draws into the file of atomic_write",
    "benchmarks/reproduction/pictures.py: savefig": "it draws into the file of atomic_write",
    "benchmarks/reproduction/runner.py: open w": "the lock of a runner; its content is empty",
    "benchmarks/harness.py: open a": "rows are appended to a file of the repository",
    "benchmarks/bench_data.py: write_text": "a log in the temporary folder of a benchmark",
    "benchmarks/memory.py: write_text": "it resets a counter of the Linux kernel",
    "examples/train_on_csv.py: open w": "a log in a new temporary folder",
    "setup.py": "it builds the package in the folder of the sources",
}


def calls(tree):
    """Yield each call with the last part of its name, and the text before it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node, node.func.id, ""
            elif isinstance(node.func, ast.Attribute):
                inner = node.func.value
                # Only names matter. The text of a longer expression would take long to build.
                plain = isinstance(inner, ast.Name | ast.Attribute)
                yield node, node.func.attr, ast.unparse(inner) if plain else "expression"


def mode_of(node, last, before):
    """Return the mode of a call of ``open``, ``Path.open`` or ``os.fdopen``."""
    given = {keyword.arg: keyword.value for keyword in node.keywords}.get("mode")
    place = 0 if before and before not in ("io", "os") and last == "open" else 1
    if given is None and len(node.args) > place:
        given = node.args[place]
    return given.value if isinstance(given, ast.Constant) and isinstance(given.value, str) else "r" if given is None else "?"


def writers(tree):
    """Yield the name of every call that writes a file."""
    for node, last, before in calls(tree):
        if last in ("open", "fdopen") and before == "os" and last == "open":
            if "O_CREAT" in ast.unparse(node):
                yield "os.open O_CREAT"
        elif last in ("open", "fdopen"):
            mode = mode_of(node, last, before)
            if re.search("[wax+?]", mode):
                yield f"open {mode.strip('b')}"
        elif last in OF and before:
            if OF[last] is None or before in OF[last]:
                yield last if OF[last] is None else f"{before}.{last}"
        elif last in WRITERS and (before or last[0].isupper()):
            yield last


@cache
def trees():
    return [(path, ast.parse(path.read_text())) for path in SOURCES]


def found(rule):
    """Return ``file: call`` for every call that ``rule`` finds in the sources."""
    return [f"{path.relative_to(ROOT)}: {name}" for path, tree in trees() for name in rule(tree)]


def check(rule, allowed):
    seen = found(rule)
    files = {entry.partition(":")[0] for entry in seen}
    forbidden = sorted({entry for entry in seen if entry not in allowed and entry.partition(":")[0] not in allowed})
    assert forbidden == []
    assert allowed.keys() <= {*seen, *files}, "an entry of the list is not needed any more"


def test_every_output_is_written_whole():
    check(writers, MAY_WRITE)


@pytest.mark.parametrize("code", [
    "open(x, 'w')", "path.open('a')", "open(x, mode='xb')", "io.open(x, 'r+')", "path.write_text('')", "path.write_bytes(b'')",
    "np.save(x, y)", "torch.save(x, y)", "os.replace(x, y)", "shutil.copy(x, y)", "figure.savefig(x)", "json.dump(x, y)",
    "tempfile.NamedTemporaryFile()", "parquet.ParquetWriter(x)", "os.open(x, os.O_CREAT | os.O_WRONLY)", "open(x, how)",
])  # fmt: skip
def test_a_planted_writer_is_found(code):
    assert list(writers(ast.parse(code)))


@pytest.mark.parametrize(
    "code", ["open(x)", "path.open('rb')", "write_text(x, y)", "text.replace(x, y)", "os.open(x, os.O_RDONLY)"]
)
def test_reading_is_not_found(code):
    assert not list(writers(ast.parse(code)))


# Functions that run code which they are given.
RUNNERS = {"eval", "exec", "compile", "execfile", "__import__"}
RUNNING_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "pty", "commands"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"}
UNSAFE_YAML = {"load", "load_all", "full_load", "unsafe_load", "full_load_all", "unsafe_load_all"}
NETWORK = {"urllib", "requests", "http", "socket", "ftplib", "httpx", "aiohttp", "smtplib", "xmlrpc"}

MAY_RUN = {
    "lares_fast/verify/gpu_edge_cases.py: import pickle": "it copies its own model by pickle to see that this works",
}


def runners(tree):
    """Yield the name of everything that can run code from a text, a file or a shell, or reach the network."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.partition(".")[0] in RUNNING_MODULES | NETWORK or name.startswith("torch.hub"):
                yield f"import {name}"
    for node, last, before in calls(tree):
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        full = f"{before}.{last}" if before else last
        if last in RUNNERS and not before:
            yield last
        if full in SHELLS or before == "torch.hub":
            yield full
        if "shell" in keywords and not (isinstance(keywords["shell"], ast.Constant) and keywords["shell"].value is False):
            yield "shell"
        if full == "torch.load" and ast.unparse(keywords.get("weights_only", ast.Constant(False))) != "True":
            yield "torch.load without weights_only"
        if full in ("np.load", "numpy.load") and ast.unparse(keywords.get("allow_pickle", ast.Constant(False))) != "False":
            yield "np.load with pickles"
        if before == "yaml" and last in UNSAFE_YAML:
            yield full


def test_nothing_runs_code_from_a_text_or_a_file():
    check(runners, MAY_RUN)


@pytest.mark.parametrize("code", [
    "eval(x)", "exec(x)", "import pickle", "from marshal import loads", "os.system(x)", "subprocess.run(x, shell=True)",
    "subprocess.run(x, shell=how)", "torch.load(x)", "torch.load(x, weights_only=False)", "np.load(x, allow_pickle=True)",
    "yaml.load(x)", "import urllib.request", "torch.hub.load(x)", "compile(x, y, z)",
])  # fmt: skip
def test_a_planted_runner_is_found(code):
    assert list(runners(ast.parse(code)))


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.stem for path in WORKFLOWS])
def test_a_workflow_uses_fixed_versions_and_may_only_read(path):
    text = path.read_text()
    assert re.search(r"^permissions:\n  contents: read\n\n", text, re.MULTILINE) and "write" not in text
    uses = re.findall(r"uses: (\S+)(.*)", text)
    assert uses and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) and "# v" in note for action, note in uses)
    assert text.count("actions/checkout@") == text.count("persist-credentials: false")
    assert "pull_request_target" not in text and "secrets." not in text
    for packages in re.findall(r"pip install (.*)", text):
        assert all("==" in package for package in packages.split()), packages
    # An expression in a script would be run as a part of it.
    assert not re.search(r"run: .*\$\{\{", text)


def test_setup_runs_programs_only_inside_its_functions():
    tree = ast.parse((ROOT / "setup.py").read_text())
    top = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.If)]
    assert not [name for node in top for _, name, before in calls(node) if before in ("subprocess", "os", "shutil")]
