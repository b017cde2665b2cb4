"""A small data set, and many ways to damage it; docs/data.md shows the table of them.

    python tests/helpers/damaged_sets.py docs/data.md

writes that table anew.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("red", "green", "blue")
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 70, 230)}
WIDTH, HEIGHT = 96, 64
REFUSED, LEFT_OUT, REPAIRED, USED = "refused", "refused, or left out", "repaired", "used"
BEGIN, END = "<!-- the table of damaged data sets begins -->", "<!-- the table of damaged data sets ends -->"


@dataclass
class SmallSet:
    """A data set of 4 images with two boxes each, and what a perfect detector finds in it."""

    folder: Path
    data: dict
    truth: dict[str, list[tuple[str, list[float]]]]  # by file name: class and (x, y, width, height)
    content: bytes | None = None  # of the annotation file, in place of `data`
    options: list[str] = field(default_factory=list)  # KEY VALUE pairs that this set needs

    @property
    def images(self) -> list[dict]:
        return self.data["images"]

    @property
    def annotations(self) -> list[dict]:
        return self.data["annotations"]

    @property
    def json_file(self) -> Path:
        return self.folder / "boxes.json"

    @property
    def image_root(self) -> Path:
        return self.folder / "images"

    def picture(self, index: int = 1) -> Path:
        return self.image_root / self.images[index]["file_name"]

    def drop(self, index: int = 1) -> None:
        """What is to be found once an image is left out."""
        self.truth.pop(self.images[index]["file_name"])

    def drop_box(self, index: int = 2) -> None:
        """What is to be found once an annotation is left out."""
        image = self.images[self.annotations[index]["image_id"] - 1]
        del self.truth[image["file_name"]][index % 2]

    def save(self) -> None:
        if not self.json_file.is_fifo():
            content = json.dumps(self.data).encode() if self.content is None else self.content
            self.json_file.write_bytes(content)


def make_set(folder: Path, names: tuple[str, ...] = NAMES, seed: int = 0) -> SmallSet:
    """Draw the set into a folder; its file is not written yet."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    found = SmallSet(folder, {"info": {}, "licenses": [], "images": [], "annotations": [], "categories": []}, {})
    found.data["categories"] = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    for i in range(4):
        picture = rng.integers(90, 130, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        name, boxes = f"{i + 1}.png", []
        for j in range(2):
            label = (2 * i + j) % 3
            x, y = 8 + 44 * j + i, 10 + 3 * i + 12 * j
            w, h = 20 + 4 * j + i, 18 + 2 * i
            picture[y : y + h, x : x + w] = COLOURS[NAMES[label]]
            boxes.append((names[label], [x, y, w, h]))
            record = {"id": 2 * i + j + 1, "image_id": i + 1, "category_id": label + 1, "iscrowd": 0}
            found.annotations.append(record | {"bbox": [x, y, w, h], "area": w * h})
        Image.fromarray(picture).save(folder / "images" / name)
        found.images.append({"id": i + 1, "file_name": name, "width": WIDTH, "height": HEIGHT})
        found.truth[name] = boxes
    return found


@dataclass(frozen=True)
class Damage:
    """A way to damage a set, and what is to become of it."""

    title: str
    outcome: str
    words: str  # in the error or in the warning
    change: Callable[[SmallSet], None]
    options: tuple[str, ...] = ()  # KEY VALUE pairs for both sets of a run
    names: tuple[str, ...] = NAMES  # of the classes of both sets
    as_training: bool = True  # also tried as DATASETS.TRAIN
    as_test: bool = True


DAMAGES: list[Damage] = []


def damage(title: str, outcome: str, words: str = "", **more) -> Callable:
    """Add a function that damages a set to the table."""

    def add(change: Callable[[SmallSet], None]) -> Callable[[SmallSet], None]:
        DAMAGES.append(Damage(title, outcome, words, change, **more))
        return change

    return add


def each(records: list[dict], change: Callable[[dict], dict]) -> None:
    for record in records:
        record |= change(record)


# --- the file


@damage("a byte order mark before the JSON", REPAIRED, "UTF-8 with a byte order mark")
def _(s):
    s.content = b"\xef\xbb\xbf" + json.dumps(s.data).encode()


@damage("JSON in UTF-16", REPAIRED, "is in UTF-16")
def _(s):
    s.content = json.dumps(s.data).encode("utf-16")


@damage("JSON in Latin-1, with an umlaut", REFUSED, "is not valid JSON")
def _(s):
    s.data["info"] = {"by": "Müller"}
    s.content = json.dumps(s.data, ensure_ascii=False).encode("latin-1")


@damage("JSON cut in the middle", REFUSED, "is not valid JSON")
def _(s):
    s.content = json.dumps(s.data).encode()[:500]


@damage("a FIFO in place of the annotation file", REFUSED, "is a folder or a pipe")
def _(s):
    os.mkfifo(s.json_file)


@damage("an empty annotation file", REFUSED, "is not valid JSON")
def _(s):
    s.content = b""


@damage("a gzip file", REFUSED, "it is compressed: unpack it")
def _(s):
    s.content = b"\x1f\x8b\x08\x00 and so on"


@damage("JSON nested 100,000 deep", REFUSED, "is not valid JSON")
def _(s):
    s.content = b"[" * 100_000


@damage("a list in place of an object", REFUSED, 'has no list "images"')
def _(s):
    s.content = b"[]"


@damage("no `info` and no `licenses` (pycocotools 2.0.10 fails)", REPAIRED, "has no info, which some")
def _(s):
    del s.data["info"], s.data["licenses"]


@damage("an empty list of images", REFUSED, 'lists no "images"')
def _(s):
    s.data["images"] = []


@damage("an empty list of categories", REFUSED, 'lists no "categories"')
def _(s):
    s.data["categories"] = []


@damage("no annotations, for training", REFUSED, "has no box to train on", as_test=False)
def _(s):
    s.data["annotations"] = []


@damage("only crowds, for training", REFUSED, "has no box to train on", as_test=False)
def _(s):
    each(s.annotations, lambda a: {"iscrowd": 1})


@damage("no annotations, for evaluation", USED, "predictions are written, but no AP is computed", as_training=False)
def _(s):
    s.data["annotations"], s.truth = [], {}


@damage("no key `annotations`, for evaluation", USED, "predictions are written, but no AP is computed",
        as_training=False)
def _(s):
    del s.data["annotations"]
    s.truth = {}


# --- classes


@damage("the classes under other ids", REPAIRED, "matched by name")
def _(s):
    new = {1: 3, 2: 1, 3: 2}
    each(s.data["categories"] + s.annotations, lambda r: {"id" if "name" in r else "category_id":
         new[r["id" if "name" in r else "category_id"]]})  # fmt: skip


@damage("the classes under ids with gaps, 7, 20 and 90", USED)
def _(s):
    new = {1: 7, 2: 20, 3: 90}
    each(s.data["categories"], lambda c: {"id": new[c["id"]]})
    each(s.annotations, lambda a: {"category_id": new[a["category_id"]]})


@damage("the classes under ids from 0", USED)
def _(s):
    each(s.data["categories"], lambda c: {"id": c["id"] - 1})
    each(s.annotations, lambda a: {"category_id": a["category_id"] - 1})


@damage("the categories listed in another order, same ids", USED)
def _(s):
    s.data["categories"].reverse()


@damage("another class name", REFUSED, "has other class names than")
def _(s):
    s.data["categories"][1]["name"] = "yellow"


@damage("a class name that differs in a capital letter", REFUSED, "they differ only in spaces or capital letters")
def _(s):
    s.data["categories"][1]["name"] = "Green"


@damage("one class less", REFUSED, "has other class names than")
def _(s):
    s.data["categories"].pop()
    s.data["annotations"] = [a for a in s.annotations if a["category_id"] < 3]


@damage("two classes of the same name", REFUSED, "category name red occurs twice")
def _(s):
    s.data["categories"][1]["name"] = "red"


@damage("two classes of the same id", REFUSED, "category id 1 occurs twice")
def _(s):
    s.data["categories"][1]["id"] = 1


@damage("class names that are numbers", REPAIRED, "has the number 1 as its name", names=("1", "2", "3"))
def _(s):
    each(s.data["categories"], lambda c: {"name": c["id"]})


@damage("an empty class name", REFUSED, "give it a name in words")
def _(s):
    s.data["categories"][1]["name"] = ""


@damage("text as category ids", REPAIRED, "as its id, with which pycocotools cannot work")
def _(s):
    each(s.data["categories"], lambda c: {"id": f"c{c['id']}"})
    each(s.annotations, lambda a: {"category_id": f"c{a['category_id']}"})


@damage("category ids written as 1.0", REPAIRED, "which is not a whole number of usual size")
def _(s):
    each(s.data["categories"], lambda c: {"id": float(c["id"])})
    each(s.annotations, lambda a: {"category_id": float(a["category_id"])})


# --- ids


@damage("text as image ids", REPAIRED, "has the text 'img-1' as its id")
def _(s):
    each(s.images, lambda i: {"id": f"img-{i['id']}"})
    each(s.annotations, lambda a: {"image_id": f"img-{a['image_id']}"})


@damage('image ids 1 in the list of images, "1" in the annotations', REPAIRED, "they are taken for the same")
def _(s):
    each(s.annotations, lambda a: {"image_id": str(a["image_id"])})


@damage("image ids beyond 2**63", REPAIRED, "which is not a whole number of usual size")
def _(s):
    each(s.images, lambda i: {"id": 2**70 + i["id"]})
    each(s.annotations, lambda a: {"image_id": 2**70 + a["image_id"]})


@damage("image id 0, and negative ones", USED)
def _(s):
    each(s.images, lambda i: {"id": 2 - i["id"]})
    each(s.annotations, lambda a: {"image_id": 2 - a["image_id"]})


@damage("two images of the same id", REFUSED, "image id 1 occurs twice")
def _(s):
    s.images[1]["id"] = 1


@damage("null as an image id", REFUSED, "has id None: give it a whole number")
def _(s):
    s.images[1]["id"] = None


@damage("text as annotation ids", REPAIRED, "has id 'a1', which pycocotools cannot use")
def _(s):
    each(s.annotations, lambda a: {"id": f"a{a['id']}"})


@damage("annotation id 0", REPAIRED, "has id 0, which pycocotools cannot use")
def _(s):
    each(s.annotations, lambda a: {"id": a["id"] - 1})


@damage("all annotations with the same id", REPAIRED, "has the id of another annotation")
def _(s):
    each(s.annotations, lambda a: {"id": 5})


@damage("annotations without an id", REPAIRED, "has no id")
def _(s):
    for annotation in s.annotations:
        del annotation["id"]


@damage("an annotation of an image that is not listed", LEFT_OUT, 'has image_id 99, which "images" lacks')
def _(s):
    s.drop_box()
    s.annotations[2]["image_id"] = 99


@damage("an annotation of a class that is not listed", LEFT_OUT, 'has category_id 9, which "categories" lacks')
def _(s):
    s.drop_box()
    s.annotations[2]["category_id"] = 9


@damage("a list in place of an image_id", LEFT_OUT, "has image_id [1], which")
def _(s):
    s.drop_box()
    s.annotations[2]["image_id"] = [1]


@damage("a number in place of an annotation", LEFT_OUT, "annotation number 2 is not a JSON object")
def _(s):
    s.drop_box()
    s.annotations[2] = 7


# --- fields of annotations


@damage('`iscrowd` as text, "0"', REPAIRED, "has iscrowd '0': it is read as 0")
def _(s):
    each(s.annotations, lambda a: {"iscrowd": "0"})


@damage("`iscrowd` as true and false", REPAIRED, "has iscrowd False: it is read as 0")
def _(s):
    each(s.annotations, lambda a: {"iscrowd": False})


@damage("no `iscrowd`", REPAIRED, "has no iscrowd: it is taken for 0")
def _(s):
    for annotation in s.annotations:
        del annotation["iscrowd"]


@damage('`iscrowd` "perhaps"', LEFT_OUT, "has iscrowd 'perhaps', which must be 0 or 1")
def _(s):
    s.drop_box()
    s.annotations[2]["iscrowd"] = "perhaps"


@damage("`area` null", REPAIRED, "has area None: the area of its box is used instead")
def _(s):
    each(s.annotations, lambda a: {"area": None})


@damage("`area` as text", REPAIRED, "as text: it is read as a number")
def _(s):
    each(s.annotations, lambda a: {"area": str(a["area"])})


@damage("no `area`", REPAIRED, "has no area: the area of its box is used instead")
def _(s):
    for annotation in s.annotations:
        del annotation["area"]


@damage("`area` infinite", REPAIRED, "has area inf: the area of its box is used instead")
def _(s):
    each(s.annotations, lambda a: {"area": float("inf")})


@damage("a polygon of two points beside each box", USED, "only the box is used")
def _(s):
    each(s.annotations, lambda a: {"segmentation": [[*a["bbox"][:2], 30, 30]]})


@damage("text as segmentation", USED, "only the box is used")
def _(s):
    each(s.annotations, lambda a: {"segmentation": "none"})


@damage("a run-length mask of wrong length", USED)
def _(s):
    each(s.annotations, lambda a: {"segmentation": {"size": [3, 3], "counts": [0, 5]}})


@damage("no segmentation at all", USED)
def _(s):
    each(s.annotations, lambda a: {"segmentation": []})


# --- boxes


@damage("boxes as two corners", REFUSED, "look like two corners")
def _(s):
    each(s.annotations, lambda a: {"bbox": _corners(a["bbox"])})


@damage("boxes as two corners, with BOX_FORMAT xyxy", REPAIRED, "they are converted",
        options=("DATASETS.BOX_FORMAT", "xyxy"))  # fmt: skip
def _(s):
    each(s.annotations, lambda a: {"bbox": _corners(a["bbox"])})


@damage("boxes as fractions of the image", REFUSED, "must be fractions of the image")
def _(s):
    each(s.annotations, lambda a: {"bbox": _fractions(a["bbox"])})


@damage("boxes as fractions, with BOX_FORMAT xywh_relative", REPAIRED, "they are converted",
        options=("DATASETS.BOX_FORMAT", "xywh_relative"))  # fmt: skip
def _(s):
    each(s.annotations, lambda a: {"bbox": _fractions(a["bbox"])})


@damage("a box of null", LEFT_OUT, "has bbox None, which must be four finite numbers")
def _(s):
    s.drop_box()
    s.annotations[2]["bbox"] = None


@damage("a box with NaN", LEFT_OUT, "which must be four finite numbers")
def _(s):
    s.drop_box()
    s.annotations[2]["bbox"][2] = float("nan")


@damage("a box of three numbers", LEFT_OUT, "which must be four finite numbers")
def _(s):
    s.drop_box()
    s.annotations[2]["bbox"].pop()


@damage("a box with 1e30", LEFT_OUT, "reaches far beyond its image")
def _(s):
    s.drop_box()
    s.annotations[2]["bbox"][2] = 1e30


@damage("a box wholly outside its image", LEFT_OUT, "lies outside its image of 96 x 64")
def _(s):
    s.drop_box()
    s.annotations[2]["bbox"] = [120, 10, 20, 20]


@damage("a box of negative width", LEFT_OUT, "whose width or height is negative")
def _(s):
    s.drop_box()
    s.annotations[2]["bbox"][2] = -5


@damage("a box that leaves its image by 10 pixels", REPAIRED, "it is cut at the border")
def _(s):
    s.annotations[3]["bbox"] = [70, 20, 36, 20]
    s.truth["2.png"][1] = (s.truth["2.png"][1][0], [70, 20, 26, 20])


@damage("a box without area", REPAIRED, "which has no area: it is left out")
def _(s):
    s.drop_box()
    s.annotations[2]["bbox"][2] = 0


@damage("boxes as text", REPAIRED, "with text: it is read as numbers")
def _(s):
    each(s.annotations, lambda a: {"bbox": [str(value) for value in a["bbox"]]})


@damage("more boxes in an image than queries", USED, "more than the model's 1 queries",
        options=("MODEL.DEQDET.NUM_QUERIES", "1"))  # fmt: skip
def _(s):
    pass


# --- images


@damage("a missing image", LEFT_OUT, "image 2.png is missing")
def _(s):
    s.picture().unlink()
    s.drop()


@damage("all images missing", REFUSED, "correct the image root")
def _(s):
    for index in range(4):
        s.picture(index).unlink()


@damage("an image of 0 bytes", LEFT_OUT, "image 2.png is an empty file")
def _(s):
    s.picture().write_bytes(b"")
    s.drop()


@damage("a PNG cut in half", LEFT_OUT, "image 2.png is damaged or truncated")
def _(s):
    s.picture().write_bytes(s.picture().read_bytes()[: s.picture().stat().st_size // 2])
    s.drop()


@damage("a JPEG cut in half", LEFT_OUT, "image 2.jpg is damaged or truncated")
def _(s):
    path = _as_jpeg(s)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    s.drop()


@damage("a TIFF cut in half", LEFT_OUT, "image 2.tif is damaged")
def _(s):
    path = _as_other(s, "2.tif")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    s.drop()


@damage("an image that is text", LEFT_OUT, "image 2.png is text, not an image")
def _(s):
    s.picture().write_text("hello")
    s.drop()


@damage("an image that is an HTML page", LEFT_OUT, "image 2.png is an HTML page")
def _(s):
    s.picture().write_text("<!DOCTYPE html><title>404</title>")
    s.drop()


@damage("a pointer of Git LFS in place of an image", LEFT_OUT, "fetch it with git lfs pull")
def _(s):
    s.picture().write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    s.drop()


@damage("a FIFO in place of an image", LEFT_OUT, "image 2.png is a FIFO")
def _(s):
    s.picture().unlink()
    os.mkfifo(s.picture())
    s.drop()


@damage("a link to /dev/zero in place of an image", LEFT_OUT, "image 2.png is a device, not a file")
def _(s):
    s.picture().unlink()
    s.picture().symlink_to("/dev/zero")
    s.drop()


@damage("a folder in place of an image", LEFT_OUT, "image 2.png is a folder")
def _(s):
    s.picture().unlink()
    s.picture().mkdir()
    s.drop()


@damage("a link that leads nowhere", LEFT_OUT, "image 2.png is missing")
def _(s):
    s.picture().unlink()
    s.picture().symlink_to("nowhere.png")
    s.drop()


@damage("an image of another size", LEFT_OUT, "is 50 x 50 pixels, but the annotation file says 96 x 64")
def _(s):
    Image.new("RGB", (50, 50)).save(s.picture())
    s.drop()


@damage("an image that EXIF turns, with the stored size in the file", LEFT_OUT, "its EXIF orientation 6 turns it")
def _(s):
    exif = Image.Exif()
    exif[0x0112] = 6
    _as_jpeg(s, exif=exif)
    s.drop()


@damage("an image of 20,000 x 20,000 pixels", LEFT_OUT, "Pillow's own limit")
def _(s):
    Image.new("1", (20_000, 20_000)).save(s.picture())
    s.drop()


@damage("an image larger than INPUT.MAX_IMAGE_PIXELS", LEFT_OUT, "more than INPUT.MAX_IMAGE_PIXELS 10000",
        options=("INPUT.MAX_IMAGE_PIXELS", "10000"))  # fmt: skip
def _(s):
    Image.new("RGB", (200, 200)).save(s.picture())
    s.images[1] |= {"width": 200, "height": 200}
    s.drop()


@damage("an image so long that it would have no height once it is resized", LEFT_OUT, "its shorter side would vanish")
def _(s):
    Image.new("RGB", (20_000, 1)).save(s.picture())
    s.images[1] |= {"width": 20_000, "height": 1}
    s.drop()


@damage("a TIFF of floats", LEFT_OUT, "its pixels have more than 16 bits")
def _(s):
    Image.new("F", (WIDTH, HEIGHT)).save(s.image_root / "2.tif")
    s.drop()
    s.images[1]["file_name"] = "2.tif"


@damage("width and height as text", REPAIRED, "has width '96': it is read as a whole number")
def _(s):
    each(s.images, lambda i: {"width": str(i["width"]), "height": str(i["height"])})


@damage("no width and height", REPAIRED, "has width None: it is taken from the image file")
def _(s):
    for image in s.images:
        del image["width"], image["height"]


@damage("16-bit grey, palette, RGBA and CMYK images", USED)
def _(s):
    for index, mode in enumerate(("L", "P", "RGBA")):
        image = Image.open(s.picture(index)).convert(mode)
        if mode == "L":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        image.save(s.picture(index))
    name = s.images[3]["file_name"]
    Image.open(s.picture(3)).convert("CMYK").save(s.image_root / "4.jpg")
    s.images[3]["file_name"] = "4.jpg"
    s.truth["4.jpg"] = s.truth.pop(name)


@damage("a file_name that climbs out of the image root, ../", REFUSED, "leaves the image root")
def _(s):
    os.replace(s.picture(), s.folder / "2.png")
    s.images[1]["file_name"] = "../2.png"


@damage("an absolute file_name", REFUSED, "leaves the image root")
def _(s):
    s.images[1]["file_name"] = "/etc/passwd"


@damage("../, with ALLOW_OUTSIDE_ROOT True", USED, options=("DATASETS.ALLOW_OUTSIDE_ROOT", "True"))
def _(s):
    os.replace(s.picture(), s.folder / "2.png")
    s.truth["../2.png"] = s.truth.pop("2.png")
    s.images[1]["file_name"] = "../2.png"


@damage("a number as file_name", REFUSED, "give the name of a file")
def _(s):
    s.images[1]["file_name"] = 2


@damage("the same image listed twice", USED, "is listed twice")
def _(s):
    s.images[1]["file_name"] = "1.png"
    s.truth["1.png"] = s.truth["1.png"]
    del s.truth["2.png"]
    each(s.annotations[2:4], lambda a: {"bbox": s.annotations[a["id"] - 3]["bbox"]})
    each(s.annotations[2:4], lambda a: {"category_id": s.annotations[a["id"] - 3]["category_id"]})


def _corners(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y + h]


def _fractions(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]


def _as_jpeg(s: SmallSet, **more) -> Path:
    return _as_other(s, "2.jpg", **more)


def _as_other(s: SmallSet, name: str, **more) -> Path:
    """Store the second image under another name and format."""
    Image.open(s.picture()).save(s.image_root / name, **more)
    s.truth[name] = s.truth.pop(s.images[1]["file_name"])
    s.images[1]["file_name"] = name
    return s.image_root / name


def format_table() -> str:
    """The table of docs/data.md."""
    lines = ["| the data set has | it is | the line says |", "|---|---|---|"]
    for row in DAMAGES:
        words = row.words.replace("|", "\\|") or "nothing"
        lines.append(f"| {row.title} | {row.outcome} | {words} |")
    return "\n".join(lines)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    before, _, rest = path.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{format_table()}\n{END}{after}")
