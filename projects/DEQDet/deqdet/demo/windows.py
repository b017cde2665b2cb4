"""A window on the screen, where there is one."""

import os
import sys

import cv2
import numpy as np

from ..errors import UserError

ESCAPE = 27


class Window:
    """Shows one picture at a time."""

    def __init__(self, name: str):
        """
        Raises:
            UserError: there is no display, or OpenCV was built without windows.
        """
        self.name = name
        # OpenCV may end the whole process where there is no display.
        missing = sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
        try:
            if missing:
                raise UserError("no window can be opened, since there is no display: give --output")
            cv2.namedWindow(name, cv2.WINDOW_NORMAL)
        except cv2.error as error:
            raise UserError(
                "no window can be opened, since this OpenCV was built without them (opencv-python-headless): "
                "give --output"
            ) from error

    def show(self, picture: np.ndarray, *, wait: bool) -> bool:
        """
        Args:
            picture: (H, W, 3) uint8 RGB.
            wait: until a key is pressed.

        Returns:
            False after the key Esc.
        """
        cv2.imshow(self.name, picture[:, :, ::-1])
        return cv2.waitKey(0 if wait else 1) != ESCAPE
