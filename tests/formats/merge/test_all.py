"""Joining many pictures into one COCO file or one YOLO ZIP, and what holds for whatever can be
merged.
"""

from __future__ import annotations

import io
import itertools
import json
import tracemalloc
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_poll.core.errors import InputError
from sam_poll.core.types import Mask, Size
from sam_poll.formats import registry
from sam_poll.formats.registry import FormatOptions
from tests.support.results import disc, rectangle, result_of

SIZE = Size(60, 40)
Files = list[tuple[str, bytes]]


def answers(kind: str, stem: str, name: str, *labels: str, size: Size = SIZE, **more: Any) -> Files:
    """The files of one job on the picture `name`."""
    masks = [rectangle(size, 1 + i, 1, 9 + i, 9, label=label) for i, label in enumerate(labels)]
    (make,) = registry.load([kind], FormatOptions())
    return [
        (stem + document.suffix, document.body)
        for document in make(result_of(size, masks, name=name, **more))
    ]


def merged(kind: str, files: Iterable[tuple[str, bytes]]) -> bytes:
    return b"".join(registry.merged(kind, files))


def refusal(kind: str, files: Files) -> str | None:
    """The place that a refusal names, if there is one."""
    try:
        merged(kind, files)
    except InputError as error:
        return str(error.place)
    return None


def coco_of(files: Iterable[tuple[str, bytes]]) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(merged("coco", files))
    return made


def unzipped(body: bytes) -> dict[str, str]:
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name).decode() for name in archive.namelist()}


@pytest.mark.parametrize("kind", registry.mergeable())
class TestWhateverCanBeMerged:
    """What holds for cvat, coco and yolo alike."""

    def test_it_is_a_format_whose_files_have_these_endings(self, kind: str) -> None:
        assert tuple(
            ending for ending, _ in answers(kind, "", "done/a.jpg", "dog")
        ) == registry.suffixes(kind)

    def test_the_order_in_which_files_come_changes_no_byte(self, kind: str) -> None:
        jobs = [answers(kind, f"cam{n}", f"done/{n % 2}.jpg", f"label{n}", "dog") for n in range(3)]
        files = [file for job in jobs for file in job]
        orders = itertools.islice(itertools.permutations(files), 0, None, 7)
        assert len({merged(kind, order) for order in orders}) == 1

    def test_two_sizes_of_one_picture_are_refused_with_both_files(self, kind: str) -> None:
        files = [
            *answers(kind, "one", "done/a.jpg", "x"),
            *answers(kind, "two", "done/a.jpg", "x", size=Size(40, 60)),
        ]
        with pytest.raises(InputError, match=r"40×60 here but 60×40 in one\.") as caught:
            merged(kind, files)
        assert caught.value.place is not None
        assert caught.value.place.startswith("two.")

    def test_a_prefix_is_put_before_the_pictures_names(self, kind: str) -> None:
        files = answers(kind, "a", "done/a.jpg", "dog")
        prefixed = b"".join(registry.merged(kind, files, "cameras/"))
        assert prefixed == merged(kind, answers(kind, "a", "cameras/done/a.jpg", "dog"))

    def test_nothing_merges_to_a_file_without_pictures(self, kind: str) -> None:
        assert b"dog" not in merged(kind, [])

    @settings(deadline=None, max_examples=50)
    @given(noise=st.binary(max_size=60), start=st.integers(0, 400))
    def test_a_broken_file_is_an_input_error_with_its_name_or_still_sound(
        self, kind: str, noise: bytes, start: int
    ) -> None:
        good, *others = answers(kind, "good", "done/a.jpg", "dog")
        for broken in (
            noise,
            good[1][:start] + noise,
            good[1][:start] + noise + good[1][start + len(noise) :],
        ):
            assert (refusal(kind, [(good[0], broken), *others]) or "good.").startswith("good.")


# -- COCO --------------------


def test_coco_images_annotations_and_categories_are_numbered_from_1_by_name() -> None:
    made = coco_of(
        [
            *answers("coco", "z", "done/b.jpg", "cat", "ant"),
            *answers("coco", "y", "done/a.jpg", "dog"),
            *answers("coco", "x", "done/b.jpg", "dog"),
        ]
    )
    assert [(image["id"], image["file_name"]) for image in made["images"]] == [
        (1, "done/a.jpg"),
        (2, "done/b.jpg"),
    ]
    names = {category["id"]: category["name"] for category in made["categories"]}
    assert names == {1: "ant", 2: "cat", 3: "dog"}
    assert [(a["id"], a["image_id"], names[a["category_id"]]) for a in made["annotations"]] == [
        (1, 1, "dog"),
        (2, 2, "dog"),
        (3, 2, "cat"),
        (4, 2, "ant"),
    ]


def test_coco_annotations_keep_all_else_that_they_had() -> None:
    files = answers("coco", "a", "done/a.jpg", "b", "a")
    before, after = json.loads(files[0][1])["annotations"], coco_of(files)["annotations"]
    for one, other in zip(before, after, strict=True):
        assert {k: v for k, v in one.items() if k != "id"} == {
            k: v for k, v in other.items() if k != "id"
        }


def test_coco_merging_what_was_merged_changes_nothing() -> None:
    once = merged(
        "coco", [*answers("coco", "b", "done/b.jpg", "x", "y"), *answers("coco", "a", "done/a.jpg")]
    )
    assert merged("coco", [("once", once)]) == once


def test_coco_notes_of_all_jobs_on_a_picture_are_kept_each_once() -> None:
    files = [
        f
        for n, note in enumerate("xyx")
        for f in answers("coco", str(n), "done/a.jpg", notes=(note,))
    ]
    assert coco_of(files)["images"][0]["notes"] == "x; y"


def broken_coco(**changes: Any) -> bytes:
    root = json.loads(answers("coco", "a", "done/b.jpg", "dog")[0][1])
    for place, value in changes.items():
        key, _, inner = place.partition("__")
        if inner:
            root[key][0][inner] = value
        else:
            root[key] = value
    return json.dumps(root).encode()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[]", "root is not an object"),
        (b"{}", "no list `categories`"),
        (b"[" * 100_000, "nested deeper"),
        (broken_coco(annotations__score=float("nan")), "NaN"),
        (broken_coco(images=None), "no list `images`"),
        (broken_coco(images=[3]), r"images\[0\] is not an object"),
        (broken_coco(images__id="1"), r"images\[0\]\.id is not a whole number"),
        (broken_coco(images__id=True), r"images\[0\]\.id is not a whole number"),
        (broken_coco(images__file_name=""), r"images\[0\] has no file_name"),
        (broken_coco(images__width=0), "width and height"),
        (broken_coco(images__height="9"), "width and height"),
        (broken_coco(categories__name=None), r"categories\[0\] has no name"),
        (
            broken_coco(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]),
            "the id of another one",
        ),
        (broken_coco(categories=[{"name": "a"}]), r"categories\[0\] has no id"),
        (broken_coco(annotations__image_id=7), "of image 7, which is missing"),
        (broken_coco(annotations__category_id=7), "of category 7, which is missing"),
        (
            broken_coco(annotations=[{"image_id": 1, "category_id": 1}]),
            "neither a segmentation nor a bbox",
        ),
    ],
)
def test_a_broken_coco_file_is_refused_with_its_name_and_reason(body: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        merged(
            "coco", [*answers("coco", "good", "done/a.jpg", "dog"), ("cam1/bad.coco.json", body)]
        )
    assert caught.value.place == "cam1/bad.coco.json"


def test_many_coco_files_are_not_held_as_parsed_trees() -> None:
    masks = [Mask("m", 0.9, i, i, np.ones((2, 2), bool)) for i in range(20)]
    one = registry.load(["coco"], FormatOptions())[0](result_of(SIZE, masks, name="NAME"))[0].body
    files = [(f"{n}.coco.json", one.replace(b"NAME", b"%d.jpg" % n)) for n in range(100)]
    tracemalloc.start()
    total = sum(len(piece) for piece in registry.merged("coco", files))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 0.8 * len(files) * len(one)
    assert peak < 3 * total


# -- YOLO --------------------


def test_yolo_is_a_zip_in_ultralytics_layout() -> None:
    ring = disc(SIZE, 20, 20, 10, hole=4, label="wheel")
    (make,) = registry.load(["yolo"], FormatOptions())
    files = [
        ("a" + d.suffix, d.body) for d in make(result_of(SIZE, [ring], name="done/cam1/dog.v2.jpg"))
    ]
    found = unzipped(merged("yolo", files))
    assert list(found) == ["data.yaml", "train.txt", "labels/train/done/cam1/dog.v2.txt"]
    assert yaml.safe_load(found["data.yaml"]) == {
        "path": "./",
        "train": "train.txt",
        "names": {0: "wheel"},
    }
    assert found["train.txt"] == "images/train/done/cam1/dog.v2.jpg\n"
    assert found["labels/train/done/cam1/dog.v2.txt"].encode() == dict(files)["a.yolo.txt"]


def test_yolo_classes_are_given_the_numbers_of_all_labels() -> None:
    files = [
        *answers("yolo", "z", "done/a.jpg", "cat", "ant"),
        *answers("yolo", "y", "done/a.jpg", "dog"),
        *answers("yolo", "x", "done/b.jpg", "bee"),
        *answers("yolo", "w", "done/c.jpg"),
    ]
    found = unzipped(merged("yolo", files))
    names = yaml.safe_load(found["data.yaml"])["names"]
    assert names == {0: "ant", 1: "bee", 2: "cat", 3: "dog"}
    texts = {name: text for name, text in found.items() if name.startswith("labels/")}
    classes = {
        name: [names[int(line.split()[0])] for line in text.splitlines()]
        for name, text in texts.items()
    }
    assert classes["labels/train/done/a.txt"] == ["dog", "cat", "ant"]
    assert classes["labels/train/done/b.txt"] == ["bee"]
    assert classes["labels/train/done/c.txt"] == []


def test_yolo_files_carry_no_date_and_no_owner() -> None:
    with zipfile.ZipFile(
        io.BytesIO(merged("yolo", answers("yolo", "a", "done/a.jpg", "x")))
    ) as archive:
        for entry in archive.infolist():
            assert entry.date_time == (1980, 1, 1, 0, 0, 0)
            assert entry.create_system == 3


def test_yolo_pictures_that_differ_in_their_endings_only_are_refused() -> None:
    files = [*answers("yolo", "a", "done/a.jpg", "x"), *answers("yolo", "b", "done/a.png", "x")]
    with pytest.raises(InputError, match="only their extensions differ") as caught:
        merged("yolo", files)
    assert caught.value.place == "b.yolo.yaml"


@pytest.mark.parametrize("missing", [0, 1])
def test_half_a_yolo_answer_is_refused(missing: int) -> None:
    halves = answers("yolo", "a", "done/a.jpg", "x")
    del halves[missing]
    with pytest.raises(InputError, match="file is missing") as caught:
        merged("yolo", [*answers("yolo", "b", "done/b.jpg", "x"), *halves])
    assert caught.value.place == halves[0][0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"7 0.1 0.1 0.2 0.1 0.2 0.2", "class 7 is not among"),
        (b"dog 0.1 0.1 0.2 0.1 0.2 0.2", "class dog is not among"),
        (b"0 0.1 0.1 0.2 0.2", "three points"),
        (b"0 0.1 0.1 0.2 0.1 0.2 0.2 0.3", "three points"),
        (b"0 0.1 0.1 0.2 0.1 0.2 nan", "within 0…1"),
        (b"0 0.1 0.1 0.2 0.1 0.2 1.01", "within 0…1"),
        (b"0 0.1 0.1 0.2 0.1 0.2 -0.1", "within 0…1"),
        (b"0 0.1 0.1 0.2 0.1 0.2 1_0e-9", "within 0…1"),
        (b"\xff\xfe", "text of numbers"),
    ],
)
def test_a_broken_yolo_line_is_refused_with_its_file_and_reason(line: bytes, reason: str) -> None:
    text, facts = answers("yolo", "bad", "done/a.jpg", "dog")
    with pytest.raises(InputError, match=reason) as caught:
        merged("yolo", [(text[0], text[1] + line + b"\n"), facts])
    assert caught.value.place in ("bad.yolo.txt", "bad.yolo.txt, line 2")


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (b"", "no keys"),
        (b"\xff", "UTF-8"),
        (b"- a", "no keys"),
        (b"image: &a b\nwidth: *a", "aliases"),
        (b"image: 3\nwidth: 60\nheight: 40\nnames: {}", "`image` is not a name"),
        (b"image: ../a.jpg\nwidth: 60\nheight: 40\nnames: {}", "cannot be named in a ZIP"),
        (b"image: /etc/a.jpg\nwidth: 60\nheight: 40\nnames: {}", "cannot be named in a ZIP"),
        (b"image: 'a\\b.jpg'\nwidth: 60\nheight: 40\nnames: {}", "cannot be named in a ZIP"),
        (b'image: "a\\nb.jpg"\nwidth: 60\nheight: 40\nnames: {}', "cannot be named in a ZIP"),
        (b"image: a.jpg\nwidth: wide\nheight: 40\nnames: {}", "width and height"),
        (b"image: a.jpg\nwidth: 60\nheight: 40\nnames: [dog]", "by their numbers"),
        (b"image: a.jpg\nwidth: 60\nheight: 40\nnames: {dog: 0}", "by their numbers"),
        (b"image: a.jpg\nwidth: 60\nheight: 40\nnames: {0: null}", "class 0 is not a text"),
    ],
)
def test_broken_yolo_facts_are_refused_with_their_file_and_reason(
    facts: bytes, reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        merged("yolo", [("bad.yolo.txt", b""), ("bad.yolo.yaml", facts)])
    assert (caught.value.place or "").startswith("bad.yolo.yaml")
