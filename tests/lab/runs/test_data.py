"""Data sets: which there are, how they are split, limited and standardized, and where they come from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from images import (
    REPOSITORY,
    TRAIN,
    assert_float32_close,
    encode,
    expected,
    labels,
    random_pixels,
    write_cifar10,
    write_mnist,
)

from streamnorm.lab.runs.classifier import data
from streamnorm.lab.runs.hub import answers

pytestmark = pytest.mark.usefixtures("own_cache")


# --- digits


def test_digits_has_the_documented_shapes_and_is_standardized():
    d = data.load("digits")
    assert d.name == "digits"
    assert d.classes == 10
    assert "scikit-learn" in d.source
    assert d.train_x.shape == (1437, 1, 8, 8)
    assert d.test_x.shape == (360, 1, 8, 8)
    assert d.train_y.dtype == d.test_y.dtype == torch.int64
    assert d.train_x.dtype == d.test_x.dtype == torch.float32
    assert d.train_x.double().mean().abs() < 1e-5
    assert (d.train_x.double().std(correction=0) - 1).abs() < 1e-5
    assert d.test_x.mean().abs() > 1e-4, "the test split was standardized by its own mean"


def test_digits_splits_the_whole_set_without_overlap():
    from sklearn.datasets import load_digits

    raw = data.DATASETS["digits"](None)
    ours = torch.cat([raw.train[0], raw.test[0]]).flatten(1).tolist()
    theirs = load_digits().data.astype(int).tolist()
    assert ours != theirs, "not shuffled"
    assert sorted(ours) == sorted(theirs)
    by_image = {tuple(x): y for x, y in zip(theirs, load_digits().target.tolist(), strict=True)}
    assert [by_image[tuple(x)] for x in ours] == torch.cat([raw.train[1], raw.test[1]]).tolist()


def test_digits_split_is_the_recorded_one_whatever_the_global_seed():
    first = data.load("digits")
    torch.manual_seed(123)
    state = torch.get_rng_state()
    second = data.load("digits")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.train_x, second.train_x)
    assert torch.equal(first.test_y, second.test_y)
    assert first.train_y[:10].tolist() == [6, 5, 5, 7, 9, 9, 8, 4, 6, 8]
    assert first.test_y[:10].tolist() == [2, 4, 8, 4, 9, 6, 8, 7, 7, 2]


# --- names and limits


def test_limits_keep_the_first_images_and_do_not_change_them():
    whole, part = data.load("digits"), data.load("digits", train_limit=30, test_limit=7)
    assert part.train_x.shape[0] == part.train_y.shape[0] == 30
    assert part.test_x.shape[0] == part.test_y.shape[0] == 7
    assert torch.equal(part.train_x, whole.train_x[:30])
    assert torch.equal(part.train_y, whole.train_y[:30])
    assert torch.equal(part.test_x, whole.test_x[:7])
    assert torch.equal(part.test_y, whole.test_y[:7])
    assert data.load("digits", train_limit=1437, test_limit=360).test_x.shape[0] == 360


@pytest.mark.parametrize("key", ["train_limit", "test_limit"])
@pytest.mark.parametrize("limit", [0, -1, 2.0, True, "10", 1438])
def test_a_limit_out_of_range_is_refused(key, limit):
    with pytest.raises(ValueError, match=rf"{key}.*{limit}"):
        data.load("digits", **{key: limit})


@pytest.mark.parametrize(
    ("name", "near"), [("cifar-10", "cifar10"), ("MNIST", "mnist"), ("digit", "digits"), ("xyzzy", None)]
)
def test_an_unknown_name_lists_the_known_and_suggests_the_nearest(name, near):
    with pytest.raises(ValueError, match="cifar10, digits, mnist") as caught:
        data.load(name)
    assert repr(name) in str(caught.value)
    assert (f"Did you mean {near!r}" in str(caught.value)) if near else ("Did you mean" not in str(caught.value))


def test_a_new_data_set_is_one_entry_and_may_have_no_space_axes(monkeypatch):
    x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
    pair = (x, torch.tensor([0, 1]))
    monkeypatch.setitem(data.DATASETS, "table", lambda root: data.Raw("table", "here", pair, pair, 1.0, 2))
    got = data.load("table")
    assert got.classes == 2
    torch.testing.assert_close(got.train_x, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
    assert torch.equal(x, torch.tensor([[1.0, 10.0], [3.0, 30.0]])), "the loader's tensor was changed in place"


def test_a_constant_channel_is_refused_rather_than_divided_by_zero(monkeypatch):
    pair = (torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))
    monkeypatch.setitem(data.DATASETS, "flat", lambda root: data.Raw("flat", "here", pair, pair))
    with pytest.raises(data.DataError, match="same in all training images"):
        data.load("flat")


@pytest.mark.parametrize(("name", "module"), [("digits", "sklearn"), ("cifar10", "pyarrow"), ("cifar10", "PIL")])
def test_a_missing_package_says_what_to_install(name, module, tmp_path, monkeypatch):
    write_cifar10(tmp_path / "cifar10")
    for loaded in [key for key in sys.modules if key.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}.*pip install 'streamnorm\[cli\]'"):
        data.load(name, tmp_path)


def test_the_argument_comes_before_the_environment(tmp_path, monkeypatch):
    write_mnist(tmp_path / "right" / "mnist")
    monkeypatch.setenv("STREAMNORM_DATA", str(tmp_path / "wrong"))
    assert data.load("mnist", str(tmp_path / "right")).name.startswith("mnist")


# --- the hub


def test_the_hub_answer_is_decoded_and_its_revision_recorded(monkeypatch):
    import datasets

    x = random_pixels(TRAIN, 3, 32, 32)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    rows = {"img": [{"bytes": encode(i, "PNG"), "path": None} for i in x], "label": labels(TRAIN)}
    both = datasets.DatasetDict({split: datasets.Dataset.from_dict(rows, features) for split in ("train", "test")})
    revision = "0123456789abcdef" * 2 + "01234567"
    both["train"].info.download_checksums = {f"hf://datasets/uoft-cs/cifar10@{revision}/plain_text/a.parquet": {}}
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda repo: asked.append(repo) or both)
    d = data.load("cifar10")
    assert asked == ["uoft-cs/cifar10"]
    assert d.name.startswith("cifar10 [partial")
    assert f"uoft-cs/cifar10, revision {revision}" in d.source
    assert d.train_y.tolist() == labels(TRAIN)
    assert_float32_close(d.train_x, expected(x, x))


def test_a_given_folder_never_falls_back_to_the_hub(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda repo: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="files not found"):
        data.load("mnist", tmp_path)


OFFLINE = """
import json, sys
from streamnorm.lab.runs.classifier import data
heavy = sorted({"datasets", "sklearn", "PIL", "pyarrow", "torchvision"} & set(sys.modules))
messages = {}
for name in ("mnist", "cifar10"):
    try:
        data.load(name)
    except FileNotFoundError as error:
        messages[name] = str(error)
print(json.dumps([heavy, messages]))
"""


def test_who_answers_with_an_error_is_there(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Refusing(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert answers(url)
    assert not answers(url)


NOBODY = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "", "no_proxy": "127.0.0.1"}


@pytest.mark.parametrize("how", [{"HF_HUB_OFFLINE": "1"}, NOBODY], ids=["told", "nobody answers"])
def test_import_is_lean_and_offline_without_files_says_at_once_how_to_give_them(how, tmp_path):
    changes = {**how, "HF_HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", OFFLINE], env=os.environ | changes, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr
    heavy, messages = json.loads(done.stdout.splitlines()[-1])
    assert heavy == []
    for name, repo, file in (
        ("mnist", "ylecun/mnist", "t10k-labels-idx1-ubyte.gz"),
        ("cifar10", "uoft-cs/cifar10", "train-*.parquet"),
    ):
        for word in (repo, file, "STREAMNORM_DATA=FOLDER", "--data-root FOLDER"):
            assert word in messages[name], f"{word} not in {messages[name]}"
