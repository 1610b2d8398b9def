"""Every layer of every network, and their parameters, against what the paper's description gives by hand."""

import pytest
import torch
from tasks import TASKS

from pl_layer_rotation import select_layers

Shape = tuple[int, ...]


def conv(channels: int, width: int, size: int = 3) -> Shape:
    return (width, channels, size, size)


def resnet(blocks: int, classes: int) -> list[Shape]:
    """Three stages of blocks of two convolutions; a 1×1 shortcut where the width doubles, after its block's two."""
    first = [conv(3, 16), *[conv(16, 16)] * (2 * blocks)]
    second = [conv(16, 32), conv(32, 32), conv(16, 32, 1), *[conv(32, 32)] * (2 * blocks - 2)]
    third = [conv(32, 64), conv(64, 64), conv(32, 64, 1), *[conv(64, 64)] * (2 * blocks - 2)]
    return [*first, *second, *third, (classes, 64)]


def wide_stage(channels: int, width: int) -> list[Shape]:
    """Four blocks; the first of every stage, that of the first stage too, has a shortcut."""
    return [conv(channels, width), conv(width, width), conv(channels, width, 1), *[conv(width, width)] * 6]


def vgg(*widths: int, depth: int) -> list[Shape]:
    channels = (3, *widths)
    return [shape for c, w in zip(channels, widths) for shape in [conv(c, w), *[conv(w, w)] * (depth - 1)]]  # noqa: B905


BY_HAND: dict[str, tuple[list[Shape], int]] = {
    "C10-CNN1": (
        [*vgg(32, 64, 128, 256, depth=6), (10, 256)],
        # 9·(3·32 + 5·32² + 32·64 + 5·64² + 64·128 + 5·128² + 128·256 + 5·256²) + 256·10
        9 * (96 + 5_120 + 2_048 + 20_480 + 8_192 + 81_920 + 32_768 + 327_680) + 2_560,
    ),
    "C100-resnet": (
        resnet(5, 100),
        # stem 9·3·16; 10·9·16²; 9·(16·32 + 9·32²) + 16·32; 9·(32·64 + 9·64²) + 32·64; 64·100
        432 + 23_040 + 9 * (512 + 9_216) + 512 + 9 * (2_048 + 36_864) + 2_048 + 6_400,
    ),
    "tiny-CNN": (
        [*vgg(32, 64, 128, 256, 512, depth=2), (200, 512)],
        # 9·(3·32 + 32² + 32·64 + 64² + 64·128 + 128² + 128·256 + 256² + 256·512 + 512²) + 512·200
        9 * (96 + 1_024 + 2_048 + 4_096 + 8_192 + 16_384 + 32_768 + 65_536 + 131_072 + 262_144) + 102_400,
    ),
    "C10-CNN2": (
        [
            *(conv(3, 64), conv(64, 64), conv(64, 128), conv(128, 128)),
            *(conv(128, 256), conv(256, 256), conv(256, 256), conv(256, 512), *[conv(512, 512)] * 5),
            *((512, 512), (10, 512)),
        ],
        # 9·(3·64 + 64² + 64·128 + 128² + 128·256 + 2·256² + 256·512 + 5·512²) + 512² + 5120
        9 * (192 + 4_096 + 8_192 + 16_384 + 32_768 + 131_072 + 131_072 + 1_310_720) + 262_144 + 5_120,
    ),
    "C100-WRN": (
        [conv(3, 16), *wide_stage(16, 160), *wide_stage(160, 320), *wide_stage(320, 640), (100, 640)],
        # stage: 9·(c·w + 7·w²) + c·w
        432
        + (9 * (2_560 + 179_200) + 2_560)
        + (9 * (51_200 + 716_800) + 51_200)
        + (9 * (204_800 + 2_867_200) + 204_800)
        + 64_000,
    ),
    "C10-resnet110": (
        resnet(18, 10),
        # as ResNet-32 with 36 convolutions a stage: 9·(3·16 + 36·16²), 9·(16·32 + 35·32²) + 16·32, …
        9 * (48 + 9_216) + 9 * (512 + 35_840) + 512 + 9 * (2_048 + 143_360) + 2_048 + 640,
    ),
    "MNIST": ([(784, 784), (10, 784)], 614_656 + 7_840),
    "C10-example": (
        [conv(3, 64), conv(64, 64), conv(64, 128), conv(128, 128), conv(128, 256), conv(256, 256), (10, 256)],
        9 * (192 + 4_096 + 8_192 + 16_384 + 32_768 + 65_536) + 2_560,
    ),
}
# Kernel, largest absolute value, and standard deviation over it: uniform with bound √(6/in) or √(6/(in + out)), whose
# deviation is 1/√3 of it; normal with spread √(2/in) cut at twice that, which leaves 0.8796 of the spread.
UNIFORM, CUT_NORMAL = 3**-0.5, 0.8796 / 2
INITS = {
    "C10-CNN1": ("conv3_5.weight", (6 / (9 * 256)) ** 0.5, UNIFORM),
    "C100-resnet": ("block2_4.conv2.weight", 2 * (2 / (9 * 64)) ** 0.5, CUT_NORMAL),
    "tiny-CNN": ("conv4_1.weight", (6 / (9 * 512)) ** 0.5, UNIFORM),
    "C10-CNN2": ("hidden.weight", 2 * (2 / 512) ** 0.5, CUT_NORMAL),
    "MNIST": ("hidden.weight", (6 / (784 + 784)) ** 0.5, UNIFORM),
    "C10-example": ("conv5.weight", (6 / (9 * (256 + 256))) ** 0.5, UNIFORM),
}


@pytest.mark.parametrize("task", TASKS)
def test_layers_and_parameters_are_those_of_the_description(task: str) -> None:
    with torch.device("meta"):
        net = TASKS[task].network()
    shapes, parameters = BY_HAND[task]
    assert [tuple(weight.shape) for weight in select_layers(net).values()] == shapes
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
    assert sum(torch.Size(shape).numel() for shape in shapes) == parameters


@pytest.mark.parametrize("task", INITS)
def test_weights_start_as_their_initialization_says(task: str) -> None:
    torch.manual_seed(0)
    name, bound, spread = INITS[task]
    weight = dict(TASKS[task].network().named_parameters())[name]
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert weight.std().item() == pytest.approx(bound * spread, rel=0.02)


@pytest.mark.parametrize(("task", "side", "pools"), [("C10-CNN1", 32, 3), ("tiny-CNN", 64, 4)])
def test_pools_stand_between_stages_only(task: str, side: int, pools: int) -> None:
    net = TASKS[task].network()
    before_average = net[: list(dict(net.named_children())).index("average")]
    assert before_average(torch.zeros(1, 3, side, side)).shape[-1] == side // 2**pools
