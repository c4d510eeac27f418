"""PyTorch programs that put their tensors on a CUDA device, on the emulator. Runs where CPU PyTorch is installed."""

import numpy as np
import pytest

from generator.emulator import attached

torch = pytest.importorskip("torch")


@pytest.fixture
def gpu():
    with attached("sm_90a", sms=7) as gpu:
        yield gpu


def test_device_of_a_tensor(gpu):
    there, here = torch.ones(4, device="cuda"), torch.ones(4)
    assert there.device == torch.device("cuda", 0) and there.is_cuda and there.get_device() == 0
    assert here.device.type == "cpu" and not here.is_cuda and here.get_device() == -1
    on_device = {
        "computed": there + 1,
        "view": there[1:].view(3, 1),
        "with a host scalar": there * torch.tensor(2.0),
        "like": torch.empty_like(there),
        "new": there.new_zeros(3),
        "converted": there.to(torch.float16),
        "moved": here.cuda(),
        "moved by name": here.to("cuda", torch.float16),
        "moved to another's": here.to(there),
        "joined": torch.cat([there, there]),
        "detached": there.detach(),
        "parameter": torch.nn.Linear(2, 3).cuda().weight,
        "its device": torch.zeros(3, device=there.device),
        "number": torch.zeros(3, device=0),
    }
    assert [name for name, tensor in on_device.items() if not tensor.is_cuda] == []
    assert not there.cpu().is_cuda and not there.to("cpu").is_cuda and not torch.ones(3).is_cuda


def test_default_device(gpu):
    with torch.device("cuda"):
        assert torch.zeros(3).is_cuda and torch.arange(3).is_cuda
        assert not torch.zeros(3, device="cpu").is_cuda
    assert not torch.zeros(3).is_cuda


def test_gradients_are_on_the_device(gpu):
    x = torch.ones(3, device="cuda", requires_grad=True)
    (x * x).sum().backward()
    assert x.grad.is_cuda and x.grad.tolist() == [2, 2, 2]


def test_moving_copies(gpu):
    here = torch.zeros(3)
    there = here.cuda()
    there += 1
    back = there.cpu()
    there += 1
    assert (here.tolist(), back.tolist(), there.tolist()) == ([0] * 3, [1] * 3, [2] * 3)
    assert there.cuda() is there and here.cpu() is here
    with pytest.raises(TypeError, match="copy it to the host first"):
        there.numpy()
    assert (back.numpy() == np.ones(3)).all()


def test_torch_cuda(gpu):
    assert torch.cuda.is_available() and torch.cuda.device_count() == 1
    assert torch.cuda.get_device_capability() == (9, 0)
    assert torch.cuda.get_device_properties("cuda").multi_processor_count == 7
    assert torch.cuda.current_stream().cuda_stream == 0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.device(0):
        start.record()
        end.record()
    torch.cuda.synchronize()
    assert start.elapsed_time(end) >= 0


def test_operator_for_cuda_only(gpu):
    @torch.library.custom_op("bespoke_test::double_into", mutates_args=("y",), device_types="cuda")
    def double_into(x: torch.Tensor, y: torch.Tensor) -> None:
        assert x.is_cuda and y.is_cuda
        y.copy_(2 * x)

    x = torch.ones(3, device="cuda")
    for operator in (double_into, torch.ops.bespoke_test.double_into, torch.ops.bespoke_test.double_into.default):
        y = torch.empty_like(x)
        operator(x, y)
        assert y.tolist() == [2, 2, 2]
    with pytest.raises(NotImplementedError, match="CPU"):
        double_into(torch.ones(3), torch.ones(3))


def test_fake_tensors_stay_as_they_are(gpu):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert torch.ones(3, device="cuda").is_cuda and not torch.ones(3).is_cuda


def test_everything_is_put_back():
    before = torch.cuda.is_available, torch.cuda.Stream
    with attached("sm_100a"):
        assert torch.cuda.is_available() and torch.cuda.get_device_capability() == (10, 0)
        there = torch.ones(3, device="cuda")
    assert before == (torch.cuda.is_available, torch.cuda.Stream)
    assert there.device.type == "cpu" and torch.ones(3).device.type == "cpu"
