"""Drop a picture and a prompt into a folder; get its masks and contours back, ready for CVAT."""

__version__ = "0.1.0"
