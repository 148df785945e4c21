"""Files of labelme and Label Studio."""

from __future__ import annotations

from typing import Any

LABELME: dict[str, Any] = {
    "version": "5.5.0",
    "flags": {},
    "shapes": [
        {
            "label": "dog",
            "points": [[50.0, 40.0], [10.0, 10.0]],
            "group_id": None,
            "description": "",
            "shape_type": "rectangle",
            "flags": {},
            "mask": None,
        }
    ],
    "imagePath": "dog.jpg",
    "imageData": None,
    "imageHeight": 48,
    "imageWidth": 64,
}


STUDIO = [
    {
        "id": 1,
        "annotations": [{"result": []}],
        "data": {"image": "/data/upload/dog.jpg"},
        "predictions": [],
    }
]
