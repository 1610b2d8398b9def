"""The loaders read the published files; what is not whole is an error that says what to do; batches are as planned."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from errors import InputError
from image_data import ImageData, load_images, shifted_and_mirrored
from paper.small_images import pixels, random_images, write_cifar, write_folders, write_mnist, write_tiny_imagenet
from plans import make_plan
from studies import settings_of
from tasks import TASKS
from torchvision.datasets import CIFAR10, CIFAR100


def test_mnist_from_idx_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    images = load_images("MNIST", tmp_path)
    assert torch.equal(images.train, torch.from_numpy(pixels(0, 30, 28, 28))[:, None])
    assert torch.equal(images.test, torch.from_numpy(pixels(1, 10, 28, 28))[:, None])
    assert images.train_labels.tolist() == [n % 10 for n in range(30)]


@pytest.mark.parametrize(("dataset", "kind"), [("CIFAR-10", CIFAR10), ("CIFAR-100", CIFAR100)])
def test_cifar_from_pickles(dataset: str, kind: type[CIFAR10], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, kind, monkeypatch)
    images = load_images(dataset, tmp_path)
    assert torch.equal(images.train, torch.from_numpy(pixels(0, 20, 3 * 32 * 32)).view(20, 3, 32, 32))
    assert torch.equal(images.test, torch.from_numpy(pixels(1, 20, 3 * 32 * 32)).view(20, 3, 32, 32))
    assert images.test_labels.tolist() == [n % 10 for n in range(20)]


def test_cifar_10_from_class_folders(tmp_path: Path) -> None:
    write_folders(tmp_path)
    images = load_images("CIFAR-10", tmp_path)
    assert (len(images.train), len(images.test)) == (30, 20)
    assert torch.equal(images.train[4], torch.from_numpy(pixels(11, 32, 32, 3)).permute(2, 0, 1))
    assert images.train_labels.tolist() == [n // 3 for n in range(30)]


def test_tiny_imagenet_from_its_folder(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    images = load_images("Tiny ImageNet", tmp_path)
    assert images.train.shape == (4, 3, 64, 64)
    assert images.train_labels.tolist() == [0, 0, 1, 1]
    assert images.test_labels.tolist() == [1, 0, 1]
    assert torch.equal(images.train[3][0], images.train[3][1])  # the grey one
    assert not torch.equal(images.train[2][0], images.train[2][1])


@pytest.mark.parametrize("dataset", ["MNIST", "CIFAR-10", "CIFAR-100", "Tiny ImageNet"])
def test_a_folder_that_is_not_there(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"a folder that holds {dataset}, got .*nowhere, which does not exist\."):
        load_images(dataset, tmp_path / "nowhere")


@pytest.mark.parametrize("dataset", ["MNIST", "CIFAR-10", "CIFAR-100"])
def test_a_folder_without_the_data(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"must hold {dataset}'s .* Name the folder that holds it, or add --download"):
        load_images(dataset, tmp_path)


def test_a_folder_without_tiny_imagenet_says_where_it_is_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"torchvision cannot download it: get tiny-imagenet-200\.zip from cs231n"):
        load_images("Tiny ImageNet", tmp_path)


def test_half_of_mnist(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    file = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"must hold MNIST's four files .* Delete .*MNIST and add --download"):
        load_images("MNIST", tmp_path)


def test_half_of_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, CIFAR10, monkeypatch)
    file = tmp_path / CIFAR10.base_folder / "data_batch_1"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"must hold CIFAR-10's python version .* Delete .*batches-py and add --downl"):
        load_images("CIFAR-10", tmp_path)


@pytest.mark.parametrize("lost", ["train/n02/images/n02_0.JPEG", "val/images/val_1.JPEG"])
def test_a_part_of_tiny_imagenet(lost: str, tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    (tmp_path / "tiny-imagenet-200" / lost).unlink()
    with pytest.raises(InputError, match=r"(fewer for \['n02'\]|\['val_1\.JPEG'\]).* Unpack the zip again"):
        load_images("Tiny ImageNet", tmp_path)


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    write_tiny_imagenet(tmp_path)
    (tmp_path / "tiny-imagenet-200" / "train" / "n01" / "images" / "n01_1.JPEG").write_bytes(b"\xff\xd8half")
    with pytest.raises(InputError, match=r"n01_1\.JPEG must be an image, got an error: .* Unpack the data again"):
        load_images("Tiny ImageNet", tmp_path)


def test_folders_with_other_classes(tmp_path: Path) -> None:
    write_folders(tmp_path)
    (tmp_path / "cifar10" / "test" / "class3").rename(tmp_path / "cifar10" / "test" / "class33")
    with pytest.raises(InputError, match=r"same classes, got \['class3', 'class33'\] in one of them only"):
        load_images("CIFAR-10", tmp_path)


def data_of(task: str, count: int, seed: int = 0) -> ImageData:
    images = random_images(task, train=count)
    plan = make_plan(TASKS[task], settings_of(*STUDY_OF[task])[0], count, len(images.test), 1.0)
    data = ImageData(images, TASKS[task], plan, seed)
    data.setup("fit")
    return data


STUDY_OF = {"C10-CNN1": ("layca-rates", "C10-CNN1"), "MNIST": ("mnist", "MNIST")}


def test_training_and_validation_images_are_different_ones_and_all_of_them() -> None:
    data = data_of("C10-CNN1", 50)
    parts = [data.train.tensors[0], data.validation.tensors[0]]
    assert [len(part) for part in parts] == [45, 5]
    assert {image.sum().item() for part in parts for image in part} == {i.sum().item() for i in data.images.train}


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        data = data_of("C10-CNN1", 50, seed)
        data.trainer = SimpleNamespace(current_epoch=epoch)  # type: ignore[assignment]
        return [index for batch in data.train_dataloader().sampler for index in batch]

    assert order(0, 3) == order(0, 3)
    assert sorted(order(0, 3)) == list(range(45))
    assert len({tuple(order(*key)) for key in [(0, 3), (0, 4), (1, 3)]}) == 3


def test_images_are_standardized_by_all_training_pixels() -> None:
    data = data_of("MNIST", 40)
    spread, mean = torch.std_mean(data.images.train.double(), correction=0)
    images, _ = data.on_after_batch_transfer([data.images.train, data.images.train_labels], 0)
    torch.testing.assert_close(images.double(), (data.images.train.double() - mean) / spread, rtol=1e-5, atol=1e-5)


def test_augmentation_moves_by_up_to_four_pixels_and_mirrors() -> None:
    torch.manual_seed(0)
    image = torch.arange(256.0).view(1, 1, 16, 16).expand(200, -1, -1, -1)
    padded = torch.nn.functional.pad(image[:1], (4, 4, 4, 4), mode="reflect")[0, 0]
    windows = {tuple(padded[r : r + 16, c : c + 16].flatten().tolist()): (r, c) for r in range(9) for c in range(9)}
    moved = [windows.get(tuple(one.flatten().tolist())) for one in shifted_and_mirrored(image)[:, 0]]
    mirrored = [windows.get(tuple(one.flip(1).flatten().tolist())) for one in shifted_and_mirrored(image)[:, 0]]
    assert 60 < sum(place is not None for place in moved) < 140
    assert 60 < sum(place is not None for place in mirrored) < 140
    assert {row for row, _ in filter(None, moved)} == set(range(9))
