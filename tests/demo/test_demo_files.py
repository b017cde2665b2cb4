"""The demo's files: what a command line means, images of any kind, names of results."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from deqdet.data import read_image
from deqdet.demo import find_images, plan_pictures, plan_video
from deqdet.errors import UserError

ENDINGS = ["_strip.png"]


def touch(*files: Path) -> list[Path]:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    return list(files)


class TestReadImage:
    def test_sixteen_bits_are_scaled(self, tmp_path):
        """65535 becomes 255, neither cut off nor wrapped."""
        grey = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
        cv2.imwrite(str(tmp_path / "grey.png"), grey)
        assert read_image(tmp_path / "grey.png").tolist() == [[[v] * 3 for v in (0, 1, 128, 255)]]
        colour = np.array([[[0, 128 * 257, 65535], [65535, 257, 0]]], np.uint16)  # BGR
        cv2.imwrite(str(tmp_path / "colour.png"), colour)
        assert read_image(tmp_path / "colour.png").tolist() == [[[255, 128, 0], [0, 1, 255]]]

    def test_grey_and_palette(self, tmp_path):
        Image.new("L", (2, 1), 77).save(tmp_path / "grey.png")
        assert read_image(tmp_path / "grey.png").tolist() == [[[77] * 3] * 2]
        Image.new("RGB", (2, 1), (10, 200, 30)).quantize().save(tmp_path / "palette.gif")
        assert read_image(tmp_path / "palette.gif").tolist() == [[[10, 200, 30]] * 2]

    def test_transparency_becomes_white(self, tmp_path):
        pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 102]]], np.uint8)  # 102 = 0.4 * 255
        Image.fromarray(pixels).save(tmp_path / "rgba.png")
        assert read_image(tmp_path / "rgba.png").tolist() == [[[255, 0, 0], [255, 255, 255], [153, 153, 153]]]
        palette = Image.new("P", (1, 1), 0)
        palette.putpalette([9, 9, 9])
        palette.save(tmp_path / "palette.png", transparency=0)
        assert read_image(tmp_path / "palette.png").tolist() == [[[255, 255, 255]]]

    def test_cmyk(self, tmp_path):
        Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "red.jpg")  # cyan missing
        image = read_image(tmp_path / "red.jpg")
        assert image.shape == (8, 8, 3)
        assert np.abs(image.astype(int) - [255, 0, 0]).max() <= 3

    @pytest.mark.parametrize("orientation, corner", [(1, (0, 0)), (3, (1, 2)), (6, (0, 1)), (8, (2, 0))])
    def test_exif_orientation(self, tmp_path, orientation, corner):
        """Where the upper left one of 3 x 2 pixels comes to lie: 6 is a quarter turn clockwise, 8 one back."""
        pixels = np.zeros((2, 3, 3), np.uint8)
        pixels[0, 0] = 255
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
        image = read_image(tmp_path / "turned.png")
        assert image.shape == ((2, 3, 3) if orientation in (1, 3) else (3, 2, 3))
        assert np.argwhere(image[:, :, 0]).tolist() == [list(corner)]

    def test_broken_exif_is_ignored(self, tmp_path):
        Image.new("RGB", (4, 4), "white").save(tmp_path / "image.jpg", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xff\x01")
        assert (read_image(tmp_path / "image.jpg") == 255).all()

    def test_one_pixel(self, tmp_path):
        Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "one.png")
        image = read_image(tmp_path / "one.png")
        assert image.dtype == np.uint8 and image.tolist() == [[[1, 2, 3]]]

    def test_unreadable_files(self, tmp_path):
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        for name in ("cut.jpg", "cut.png"):
            Image.fromarray(noise).save(tmp_path / name)
            whole = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(whole[: len(whole) // 2])
            with pytest.raises(UserError, match=f"{tmp_path / name}: cannot be read as an image: .*truncated"):
                read_image(tmp_path / name)
        (tmp_path / "text.jpg").write_text("no image")
        with pytest.raises(UserError, match=f"{tmp_path}/text.jpg: not an image"):
            read_image(tmp_path / "text.jpg")
        Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "float.tif")
        with pytest.raises(UserError, match=f"{tmp_path}/float.tif: .*more than 16 bits .mode F.: convert it"):
            read_image(tmp_path / "float.tif")


class TestFindImages:
    def test_a_folder_means_the_images_directly_in_it(self, tmp_path):
        wanted = touch(tmp_path / "A.JPG", tmp_path / "b.png", tmp_path / "c.tiff")
        touch(tmp_path / "notes.txt", tmp_path / ".hidden.jpg", tmp_path / "deeper" / "d.jpg")
        (tmp_path / "folder.jpg").mkdir()
        assert find_images([str(tmp_path)]) == (wanted, [])

    def test_files_and_globs_each_file_once(self, tmp_path):
        first, second, deep, odd = touch(*(tmp_path / x for x in ("1.jpg", "2.jpg", "a/b/3.jpg", "x[1].dat")))
        patterns = [str(second), f"{tmp_path}/*.jpg", f"{tmp_path}/a/../1.jpg", f"{tmp_path}/**/3.jpg", str(odd)]
        assert find_images(patterns) == ([second, first, deep, odd], [])

    def test_a_pattern_without_a_file_is_named(self, tmp_path):
        (tmp_path / "empty").mkdir()
        (image,) = touch(tmp_path / "1.jpg")
        patterns = [f"{tmp_path}/{name}" for name in ("empty", "gone.jpg", "*.png", "1.jpg")]
        files, faults = find_images(patterns)
        assert files == [image]
        assert [fault.split(": ")[0] for fault in faults] == patterns[:3]
        assert "no image directly in this folder" in faults[0]
        assert faults[1].endswith("does not exist") and faults[2].endswith("no file matches")

    def test_a_tilde_that_is_nobodys_home(self, tmp_path, monkeypatch):
        """It is one of the name's characters, and keeps no other file from being found."""
        monkeypatch.chdir(tmp_path)
        touch(Path("~draft.png"), Path("1.jpg"))
        files, faults = find_images(["~nosuchuser/a.png", "~draft.png", "1.jpg"])
        assert files == [Path("~draft.png"), Path("1.jpg")]
        assert faults == ["~nosuchuser/a.png: does not exist"]


class TestDestinations:
    def test_no_two_results_share_a_name(self, tmp_path):
        """Not even the files beside the pictures, nor where the file system ignores case."""
        sources = [Path(x) for x in ("a/x.jpg", "b/x.jpg", "b/X.png", "c/y.gif", "c/x_strip.png", "c/x_2.jpg")]
        pictures = plan_pictures(sources, tmp_path / "out" / "deeper", ENDINGS)
        expected = ["x.jpg", "x_3.jpg", "X_4.png", "y.png", "x_strip_2.png", "x_2.jpg"]
        assert pictures == [tmp_path / "out" / "deeper" / name for name in expected]
        assert (tmp_path / "out" / "deeper").is_dir()

    def test_a_single_image_may_go_to_a_file(self, tmp_path):
        assert plan_pictures([Path("x.jpg")], tmp_path / "new" / "y.png") == [tmp_path / "new" / "y.png"]
        assert (tmp_path / "new").is_dir()
        assert plan_pictures([Path("x.jpg")], tmp_path / "v1.2") == [tmp_path / "v1.2" / "x.jpg"]
        with pytest.raises(UserError, match="y.png is one file, but there are 2 images: give a folder"):
            plan_pictures([Path("x.jpg"), Path("z.jpg")], tmp_path / "y.png")

    def test_an_input_is_never_written_over(self, tmp_path):
        picture, strip = touch(tmp_path / "x.jpg", tmp_path / "z_strip.png")
        for sources, output, endings in (
            ([picture], tmp_path, []),
            ([picture], tmp_path / "new" / ".." / "x.jpg", []),
            ([strip, Path("z.jpg")], tmp_path / "new" / "..", ENDINGS),
        ):
            with pytest.raises(UserError, match="the input .* would be overwritten"):
                plan_pictures(sources, output, endings)

    def test_nor_another_file_in_its_folder(self, tmp_path):
        picture, video, *others = touch(*(tmp_path / name for name in ("a.webp", "v.avi", "a.png", "v.mp4")))
        for plan in (lambda: plan_pictures([picture], tmp_path), lambda: plan_video(video, tmp_path)):
            with pytest.raises(UserError, match="beside the input, would be overwritten"):
                plan()
        assert plan_pictures([picture], others[0]) == [others[0]]  # a file that was named
        assert plan_video(video, others[1]) == others[1]
        (tmp_path / "out").mkdir()
        touch(tmp_path / "out" / "a.png")
        assert plan_pictures([picture], tmp_path / "out") == [tmp_path / "out" / "a.png"]  # an earlier run's

    def test_suffixes_of_other_files(self, tmp_path):
        with pytest.raises(UserError, match="o.svg: give a folder, or a file that ends in one of .jpg"):
            plan_pictures([Path("x.jpg")], tmp_path / "o.svg")
        with pytest.raises(UserError, match="o.webm: give a folder, or a file that ends in one of .mp4"):
            plan_video(tmp_path / "film.mov", tmp_path / "o.webm")

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (file,) = touch(tmp_path / "file")
        with pytest.raises(UserError, match="cannot make the folder .*file"):
            plan_pictures([Path("x.jpg")], file / "out")

    def test_videos(self, tmp_path):
        source = tmp_path / "in" / "film.mov"
        assert plan_video(source, tmp_path / "out") == tmp_path / "out" / "film.mp4"
        assert plan_video(source, tmp_path / "out.mkv") == tmp_path / "out.mkv"
        assert plan_video(None, tmp_path) == tmp_path / "webcam.mp4"
        touch(tmp_path / "webcam.mp4", tmp_path / "webcam_2.mp4", tmp_path / "film.mp4")
        assert plan_video(None, tmp_path) == tmp_path / "webcam_3.mp4"
        with pytest.raises(UserError, match="film.mp4 would be overwritten"):
            plan_video(tmp_path / "film.mp4", tmp_path)
