"""Fixtures: small configurations, and models whose every parameter is random, so that no symmetry hides an error."""

import importlib.util
import os
import signal
import sys
import tempfile

CACHE = tempfile.TemporaryDirectory(prefix="linpass-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = CACHE.name

# A job in the background of a shell is started with Ctrl-C ignored; the tests of signals send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402  the variables above are read when huggingface_hub is imported
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

import linpass.kernels_linformer  # noqa: E402
import linpass.triton_linformer  # noqa: E402
from linpass import LinformerConfig  # noqa: E402

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")

TINY = {
    "vocab_size": 50,
    "embed_dim": 32,
    "depth": 2,
    "heads": 4,
    "seq_length": 32,
    "k": 8,
    "block_size": 8,
    "window_size": 12,
    "rank": None,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config():
    """A function (changed fields) -> LinformerConfig: 2 layers, blocks of 8 tokens, 2 slots each, a window of 12."""
    return lambda **changes: LinformerConfig(**{**TINY, **changes})


@pytest.fixture(scope="session")
def build():
    """A function (model class, configuration) -> float64 model in eval mode with random parameters."""

    def make(model_class, config, std=0.3, dtype=torch.float64):
        torch.manual_seed(1)
        model = model_class(config).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=std)
        return model

    return make


@pytest.fixture
def device():
    """The accelerator in tests marked gpu."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _without_a_device_tests_marked_gpu_are_skipped(request):
    if request.node.get_closest_marker("gpu"):
        request.getfixturevalue("device")


@pytest.fixture(scope="session")
def interpreted_kernels():
    """``linpass.triton_linformer`` once more, its kernels for Triton's interpreter."""
    path = linpass.triton_linformer.__file__
    spec = importlib.util.spec_from_file_location("linpass.interpreted_triton_linformer", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        patch.setenv("TRITON_INTERPRET", "1")  # read where @triton.jit is applied
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def kernels(request, monkeypatch):
    """``linpass.kernels_linformer``; without a CUDA device its kernels run in Triton's interpreter.

    For this test alone: the interpreter takes a second for what PyTorch does in a millisecond.
    """
    if linpass.triton_linformer.triton is None:
        pytest.skip("needs Triton: make setup")
    if not torch.cuda.is_available():
        import triton.language
        from triton.runtime.interpreter import InterpretedFunction

        # Triton's own functions in Triton (cdiv, sum ...) were compiled ones when Triton was imported.
        for name, function in vars(triton.language).items():
            if isinstance(function, triton.runtime.JITFunction):
                monkeypatch.setattr(triton.language, name, InterpretedFunction(function.fn))
        interpreted = request.getfixturevalue("interpreted_kernels")
        monkeypatch.setattr(linpass.operators_linformer, "kernels", interpreted)
        monkeypatch.setattr(linpass.kernels_linformer, "INTERPRETED", True)
    return linpass.kernels_linformer


@pytest.fixture
def recorded_launches(monkeypatch):
    """A function (kernel, tensors -> what to remember, or None) -> the list that launches are remembered in."""

    def record(describe):
        found, launch = [], linpass.operators_linformer.launch

        def remember(kernel, grid, tile, tensors, numbers):
            described = describe(kernel, tensors)
            if described is not None:
                found.append(described)
            launch(kernel, grid, tile, tensors, numbers)

        monkeypatch.setattr(linpass.operators_linformer, "launch", remember)
        return found

    return record


@pytest.fixture
def poisoned_memory():
    """torch.empty gives NaN."""
    was, before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was)
    torch.utils.deterministic.fill_uninitialized_memory = before
