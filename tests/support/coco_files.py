"""A COCO file."""

from __future__ import annotations

from typing import Any

COCO: dict[str, Any] = {
    "licenses": [{"name": "", "id": 0, "url": ""}],
    "info": {
        "contributor": "",
        "date_created": "",
        "description": "",
        "url": "",
        "version": "",
        "year": "",
    },
    "categories": [
        {"id": 1, "name": "dog", "supercategory": ""},
        {"id": 2, "name": "cat", "supercategory": ""},
    ],
    "images": [
        {
            "id": 1,
            "width": 640,
            "height": 480,
            "file_name": "done/cam1/dog.jpg",
            "license": 0,
            "date_captured": 0,
        },
        {
            "id": 2,
            "width": 100,
            "height": 50,
            "file_name": "none.jpg",
            "license": 0,
            "date_captured": 0,
        },
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 1,
            "category_id": 1,
            "segmentation": [],
            "area": 30000.0,
            "bbox": [100.5, 50.0, 200.0, 150.0],
            "iscrowd": 0,
            "attributes": {"occluded": False, "rotation": 0.0},
        },
        {
            "id": 2,
            "image_id": 1,
            "category_id": 2,
            "segmentation": [[440.0, 60.0, 460.0, 60.0, 460.0, 160.0, 440.0, 160.0]],
            "area": 2000.0,
            "bbox": [440.0, 60.0, 20.0, 100.0],
            "iscrowd": 0,
            "attributes": {
                "occluded": True,
                "rotation": 90.0,
            },  # CVAT turned it into the polygon above already
        },
        {
            "id": 3,
            "image_id": 1,
            "category_id": 1,
            "segmentation": {"counts": [0, 9], "size": [3, 3]},
            "iscrowd": 1,
        },
        {
            "id": 4,
            "image_id": 2,
            "category_id": 1,
            "segmentation": [[1, 1, 2, 1, 2, 2]],
            "iscrowd": 0,
        },
    ],
}
