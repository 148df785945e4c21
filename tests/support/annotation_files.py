"""Annotation files as other programs write them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from sam_poll.prompts.importers.shapes import NEGATIVE_LABELS, Shape

# As CVAT writes it, with every shape that it knows (docs.cvat.ai, "XML annotation format").
EXPORT = b"""<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task>
      <id>4</id>
      <name>cam1</name>
      <size>2</size>
      <mode>annotation</mode>
      <overlap>0</overlap>
      <created>2024-05-06 10:11:12.131415+00:00</created>
      <subset>default</subset>
      <start_frame>0</start_frame>
      <stop_frame>1</stop_frame>
      <labels>
        <label>
          <name>dog</name>
          <color>#c06060</color>
          <type>any</type>
          <attributes>
            <attribute>
              <name>negative</name>
              <mutable>False</mutable>
              <input_type>checkbox</input_type>
              <default_value>false</default_value>
              <values>false</values>
            </attribute>
          </attributes>
        </label>
      </labels>
      <segments><segment><id>4</id><start>0</start><stop>1</stop><url>http://localhost:8080/api/jobs/4</url></segment></segments>
      <owner><username>anna</username><email></email></owner>
    </task>
    <dumped>2024-05-06 10:12:12.131415+00:00</dumped>
  </meta>
  <image id="0" name="done/cam1/dog.jpg" width="640" height="480">
    <box label="dog" source="manual" occluded="0" xtl="100.50" ytl="50.00" xbr="300.25"
      ybr="200.00" z_order="0" group_id="1">
      <attribute name="negative">false</attribute>
    </box>
    <box label="cat" source="manual" occluded="1" xtl="400.00" ytl="100.00" xbr="500.00"
      ybr="120.00" rotation="90.00" z_order="1">
    </box>
    <points label="dog" source="manual" occluded="0" points="150.00,100.00;160.00,110.00" z_order="0" group_id="1">
      <attribute name="negative">false</attribute>
    </points>
    <points label="dog" source="manual" occluded="0" points="299.00,51.00" z_order="0" group_id="1">
      <attribute name="other">x</attribute>
      <attribute name="negative">true</attribute>
    </points>
    <points label="background" source="manual" occluded="0" points="450.00,110.00" z_order="0">
    </points>
    <polygon label="dog" source="manual" occluded="0" points="1.00,1.00;2.00,1.00;2.00,2.00" z_order="0">
      <attribute name="negative">true</attribute>
    </polygon>
    <polyline label="dog" source="manual" occluded="0" points="1.00,1.00;2.00,1.00" z_order="0"></polyline>
    <ellipse label="dog" source="manual" occluded="0" cx="9.00" cy="9.00" rx="3.00" ry="4.00" z_order="0"></ellipse>
    <cuboid label="dog" source="manual" occluded="0" xtl1="1" ytl1="1" xbl1="1" ybl1="2" z_order="0"></cuboid>
    <mask label="dog" source="auto" occluded="0" rle="0, 4, 1, 4" left="1" top="0" width="3" height="3"
      z_order="1"></mask>
    <skeleton label="body" source="manual" z_order="0">
      <points label="1" source="manual" outside="0" occluded="0" points="10.00,10.00"></points>
      <points label="2" source="manual" outside="0" occluded="0" points="20.00,10.00"></points>
    </skeleton>
    <tag label="good" source="manual"></tag>
    <tag label="bad" source="manual"></tag>
  </image>
  <image id="1" name="done/cam1/none.jpg" width="640" height="480">
  </image>
</annotations>
"""


def around(inside: str, version: str = "1.1") -> bytes:
    return f"<annotations><version>{version}</version>{inside}</annotations>".encode()


def image(inside: str, name: str = "dog.jpg") -> bytes:
    return around(f'<image id="0" name="{name}" width="64" height="48">{inside}</image>')


def box(**changed: Any) -> str:
    given = {"label": "dog", "xtl": "1", "ytl": "2", "xbr": "3", "ybr": "4", **changed}
    return (
        "<box "
        + " ".join(f'{key}="{value}"' for key, value in given.items() if value is not None)
        + "/>"
    )


number = st.floats(-1e6, 1e6).map(lambda value: round(value, 2))


label = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=9)


pair = st.tuples(number, number)


shapes = st.lists(
    st.one_of(
        st.builds(
            lambda a, b, name, group: Shape("box", name, (a, b), group),
            pair,
            pair,
            label,
            st.integers(0, 9),
        ),
        st.builds(
            lambda points, name, group, negative: Shape(
                "points", name, tuple(points), group, negative
            ),
            st.lists(pair, min_size=1, max_size=4),
            label.filter(lambda name: name not in NEGATIVE_LABELS),
            st.integers(0, 9),
            st.booleans(),
        ),
    ),
    max_size=6,
)
