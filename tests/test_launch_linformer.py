"""How kernels are started; what they compute is tested in ``test_kernels_linformer``."""

from types import SimpleNamespace

import pytest
import torch

from linpass import kernels_linformer, launch_linformer
from linpass.attention_linformer import BlockLayout


@pytest.mark.parametrize("switch", ["fp32_precision", "set_float32_matmul_precision"])
def test_products_of_float32_follow_the_switches_of_pytorch(switch):
    before = torch.backends.cuda.matmul.fp32_precision
    assert launch_linformer.precision_of(torch.float32) == "ieee"
    try:
        if switch == "fp32_precision":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        assert launch_linformer.precision_of(torch.float32) == "tf32"
        assert launch_linformer.precision_of(torch.bfloat16) == "ieee"
    finally:
        if switch == "fp32_precision":
            torch.backends.cuda.matmul.fp32_precision = before
        else:
            torch.set_float32_matmul_precision("highest")
    assert launch_linformer.precision_of(torch.float32) == "ieee"


class Kernel:
    """What Triton makes of a kernel, and the kernel itself: it says how it was started."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.started = []

    def run(self, *given):
        self.started.append(given)

    def __getitem__(self, grid):
        def prepare(*given, **options):
            self.started.append(("Triton", *given))
            return self

        return prepare


@pytest.fixture
def triton(monkeypatch):
    """A Triton without a device, in which nothing has been started."""
    hooks = SimpleNamespace(launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=SimpleNamespace(calls=[]))
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream={5: "stream of device 5"}.get))
    found = SimpleNamespace(
        __version__="3.6.1", runtime=SimpleNamespace(driver=driver), knobs=SimpleNamespace(runtime=hooks)
    )
    monkeypatch.setattr(launch_linformer, "triton", found)
    monkeypatch.setattr(launch_linformer, "STARTERS", {})
    return found


GRID, TILE = (2, 3, 1), launch_linformer.Tile(64, 64, 4, 3)
SHORT = (*GRID, "stream of device 5", "function", "metadata", None, None, None)


def tensor(address, dtype=torch.bfloat16, is_cpu=False):
    device = torch.device("cpu", 5)  # in a test any device will do
    return SimpleNamespace(device=device, dtype=dtype, is_cpu=is_cpu, data_ptr=lambda: address)


def start(kernel, *tensors, number=1):
    """What the kernel was started with."""
    launch_linformer.launch(kernel, GRID, TILE, tensors, (number, (2, 3)))
    return kernel.started.pop()


def test_only_the_first_start_of_a_kernel_is_tritons_own(triton):
    kernel, first = Kernel(), tensor(64)
    assert start(kernel, first, None) == ("Triton", first, None, 1, (2, 3))
    assert start(kernel, tensor(128), None) == (*SHORT, 128, None, 1, (2, 3))
    assert start(kernel, tensor(0), None) == (*SHORT, 0, None, 1, (2, 3))  # an empty tensor


@pytest.mark.parametrize(
    "changed", ["number", "dtype", "a tensor more", "kernel", "alignment", "alignment of the second", "CPU"]
)
def test_what_triton_compiles_anew_or_refuses_it_starts_itself(triton, changed):
    kernel = Kernel()
    start(kernel, tensor(64), None)
    given = {
        "number": (tensor(64), None),
        "dtype": (tensor(64, torch.float16), None),
        "a tensor more": (tensor(64), tensor(32)),
        "kernel": (tensor(64), None),
        "alignment": (tensor(72), None),
        "alignment of the second": (tensor(64), tensor(68)),
        "CPU": (tensor(64, is_cpu=True), None),
    }[changed]
    for once_more in (False, True):
        other = Kernel() if changed == "kernel" else kernel
        started = start(other, *given, number=16 if changed == "number" else 1)
        compiled_for_it = once_more and changed in ("number", "dtype", "a tensor more")
        assert started[0] == (GRID[0] if compiled_for_it else "Triton")


@pytest.mark.parametrize("way", ["joins", "replaces"])
def test_a_profiler_of_triton_hears_of_every_launch_while_it_listens(triton, way):
    kernel, hooks = Kernel(), triton.knobs.runtime
    start(kernel, tensor(64))
    before = hooks.launch_exit_hook
    if way == "joins":
        before.calls.append(print)
    else:
        hooks.launch_exit_hook = print
    assert start(kernel, tensor(64))[0] == "Triton"
    assert [start(kernel, tensor(64), number=2)[0] for _ in range(2)] == ["Triton", "Triton"]  # begun while it listens
    hooks.launch_exit_hook = before
    before.calls.clear()
    assert start(kernel, tensor(64))[:9] == start(kernel, tensor(64), number=2)[:9] == SHORT


def test_another_version_of_triton_is_started_as_it_says(triton):
    triton.__version__ = "4.0.0"
    kernel = Kernel()
    for _ in range(2):
        assert start(kernel, tensor(64))[0] == "Triton"


@pytest.mark.gpu
def test_a_weight_left_on_the_cpu_is_an_error_in_every_call(device):
    query, key, value = torch.randn(3, 1, 2, 40, 16, device=device, dtype=torch.bfloat16)
    weights = torch.randn(2, 1, 1, 8, 2, device=device, dtype=torch.bfloat16)
    layout = BlockLayout(block_size=8, window_size=20, slots_per_block=2, visible_blocks=9)
    output = kernels_linformer.mix_and_attend(query, key, value, tuple(weights), layout)
    for _ in range(2):
        with pytest.raises(ValueError, match="cpu tensor"):
            kernels_linformer.mix_and_attend(query, key, value, tuple(weights.cpu()), layout)
    assert torch.equal(kernels_linformer.mix_and_attend(query, key, value, tuple(weights), layout), output)


@pytest.mark.gpu
def test_tritons_profiler_hears_of_every_launch(device):
    hook = launch_linformer.triton.knobs.runtime.launch_enter_hook
    query, slots = (torch.randn(1, 2, length, 16, device=device, dtype=torch.bfloat16) for length in (40, 16))
    kernels_linformer.attend_slots(query, slots, slots)
    heard = []
    hook.add(heard.append)
    try:
        for _ in range(2):
            kernels_linformer.attend_slots(query, slots, slots)
    finally:
        hook.remove(heard.append)
    kernels_linformer.attend_slots(query, slots, slots)
    assert len(heard) == 2
