"""Pose pictures and face crops: the pixels that make Wan-Animate follow a movement.

Keypoints are COCO-WholeBody rows (x_px, y_px, score): 0..16 body, 17..22 feet, 23..90 face, 91..111
left hand, 112..132 right hand; left and right are the subject's. Pixel i covers the coordinates
[i, i + 1). Sizes are (height, width), boxes (x0, y0, x1, y1) without the far ends, colours RGB.

Every stroke follows the preprocessing released with Wan2.2-Animate, down to where a float becomes
an integer: the network has seen exactly these pixels. rtmlib's own drawing has other colours, other
widths and face points, and is no substitute.

Source: pose page sections 3, 4 and 7; golden file `pose_golden.json`.
"""

import math
from typing import Final, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from everanimate_cli.images import contain_box

FloatArray: TypeAlias = NDArray[np.floating]
FrameU8: TypeAlias = NDArray[np.uint8]
Size: TypeAlias = tuple[int, int]
Box: TypeAlias = tuple[int, int, int, int]
Rgb: TypeAlias = tuple[int, int, int]

NUM_KEYPOINTS: Final = 133
# The released face array starts one row earlier, at the right heel, but its crop leaves that out.
FACE_ROWS: Final = slice(23, 91)
HAND_ROWS: Final = (slice(91, 112), slice(112, 133))
FACE_CROP_SIZE: Final = 512  # [px] side of the face video

# A drawn joint is the mean of two keypoints; only the neck and the toes have two different ones.
_JOINT_FIRST: Final = (0, 6, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, 17, 20)
_JOINT_SECOND: Final = (0, 5, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3, 18, 21)

_JOINT_RGB: Final[tuple[Rgb, ...]] = (
    (255, 0, 0),  # nose
    (255, 85, 0),  # neck
    (255, 170, 0),  # right shoulder
    (255, 255, 0),  # right elbow
    (170, 255, 0),  # right wrist
    (85, 255, 0),  # left shoulder
    (0, 255, 0),  # left elbow
    (0, 255, 85),  # left wrist
    (0, 255, 170),  # right hip
    (0, 255, 255),  # right knee
    (0, 170, 255),  # right ankle
    (0, 85, 255),  # left hip
    (0, 0, 255),  # left knee
    (85, 0, 255),  # left ankle
    (170, 0, 255),  # right eye
    (255, 0, 255),  # left eye
    (255, 0, 170),  # right ear
    (255, 0, 85),  # left ear
    (200, 200, 0),  # left toe
    (100, 100, 0),  # right toe
)
# Limb i has the hue of joint i, which is not one of its ends, at 60 % brightness.
_LIMBS: Final[tuple[tuple[int, int, Rgb], ...]] = (
    (1, 2, (153, 0, 0)),  # neck, right shoulder
    (1, 5, (153, 51, 0)),  # neck, left shoulder
    (2, 3, (153, 102, 0)),
    (3, 4, (153, 153, 0)),
    (5, 6, (102, 153, 0)),
    (6, 7, (51, 153, 0)),
    (1, 8, (0, 153, 0)),  # neck, right hip
    (8, 9, (0, 153, 51)),
    (9, 10, (0, 153, 102)),
    (1, 11, (0, 153, 153)),  # neck, left hip
    (11, 12, (0, 102, 153)),
    (12, 13, (0, 51, 153)),
    (1, 0, (0, 0, 153)),  # neck, nose
    (0, 14, (51, 0, 153)),
    (14, 16, (102, 0, 153)),
    (0, 15, (153, 0, 153)),
    (15, 17, (153, 0, 102)),
    (13, 18, (153, 0, 51)),  # left ankle, left toe
    (10, 19, (120, 120, 0)),  # right ankle, right toe
)
# Wrist 0, then four points per finger from palm to tip. Evenly spaced hues, the same in both hands.
_HAND_EDGES: Final[tuple[tuple[int, int, Rgb], ...]] = (
    (0, 1, (255, 0, 0)),  # thumb
    (1, 2, (255, 77, 0)),
    (2, 3, (255, 153, 0)),
    (3, 4, (255, 229, 0)),
    (0, 5, (204, 255, 0)),  # index finger
    (5, 6, (128, 255, 0)),
    (6, 7, (51, 255, 0)),
    (7, 8, (0, 255, 25)),
    (0, 9, (0, 255, 102)),  # middle finger
    (9, 10, (0, 255, 179)),
    (10, 11, (0, 255, 255)),
    (11, 12, (0, 178, 255)),
    (0, 13, (0, 102, 255)),  # ring finger
    (13, 14, (0, 25, 255)),
    (14, 15, (51, 0, 255)),
    (15, 16, (128, 0, 255)),
    (0, 17, (204, 0, 255)),  # little finger
    (17, 18, (255, 0, 230)),
    (18, 19, (255, 0, 153)),
    (19, 20, (255, 0, 77)),
)
_HAND_DOT_RGB: Final[Rgb] = (0, 0, 255)

# OpenCV takes 32-bit integers; what lies this far out is an estimator's failure anyway.
FARTHEST_PX: Final = 2.0**20

_SHARE_ABOVE_FACE: Final = 0.75  # of the added height: the landmarks end at the eyebrows
_BILINEAR: Final = cv2.INTER_LINEAR


def body_joints(keypoints: FloatArray) -> NDArray[np.float64]:
    """The 20 joints of the drawn body: 17 keypoints, the neck and one toe per foot.

    The neck lies between the shoulders and a toe between big and small toe, and their scores are
    means as well: a shoulder at 0.95 and one at 0.06 still give a neck at 0.505.

    Args:
        keypoints: [133, 3] (x_px, y_px, score).

    Returns:
        [20, 3] float64. A joint with a source that is not finite has NaN coordinates and score 0.

    Raises:
        ValueError: If `keypoints` has another shape.

    Source: pose page section 3.
    """
    rows = _checked(keypoints)
    joints = (rows[list(_JOINT_FIRST)] + rows[list(_JOINT_SECOND)]) / 2  # [20, 3]
    joints[np.isnan(joints).any(axis=1)] = (np.nan, np.nan, 0.0)
    return joints


def draw_pose(keypoints: FloatArray, height: int, width: int, *, threshold: float = 0.5) -> FrameU8:
    """One picture of the pose video: limbs, joints and hands on black.

    The stroke depends on the canvas's shorter side: 1 below 600 px, 2 at 720p, 4 at 1080p. No face
    points are drawn: the expression reaches the network through the face video only.

    Args:
        keypoints: [133, 3] (x_px, y_px, score) in canvas pixels. Rows that are not finite are not
            drawn.
        height: Canvas height [px].
        width: Canvas width [px].
        threshold: Lowest score that is drawn.

    Returns:
        [H, W, 3] uint8 RGB.

    Raises:
        ValueError: If `keypoints` has another shape.

    Source: pose page section 4; `draw_cases`.
    """
    canvas: FrameU8 = np.zeros((height, width, 3), np.uint8)
    stroke = max(min(height, width) // 200 - 1, 1)
    hand_stroke = max(stroke // 2, 1)
    _draw_body(canvas, body_joints(keypoints), stroke, threshold)
    rows = _checked(keypoints)
    for hand_rows in HAND_ROWS:
        _draw_hand(canvas, rows[hand_rows], hand_stroke, threshold)
    return canvas


def face_box(
    keypoints: FloatArray, height: int, width: int, *, area_factor: float = 1.3
) -> Box | None:
    """Rectangle of the frame that becomes the face picture.

    The extent of all 68 landmarks, whatever their scores, enlarged to `area_factor` times its area
    with three quarters of the added height above, and cut at the frame's edges. It is not made
    square and not padded.

    Differs from the released preprocessing: a face outside the frame or without extent gives None,
    where the original crops another part of the frame or crashes; landmarks that are not finite are
    left out.

    Args:
        keypoints: [133, 3] (x_px, y_px, score) in frame pixels.
        height: Frame height [px].
        width: Frame width [px].
        area_factor: Area of the rectangle relative to the landmarks' extent, before cutting.

    Returns:
        (x0, y0, x1, y1) with 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height; None without a face.

    Raises:
        ValueError: If `keypoints` has another shape.

    Source: pose page section 7; `face_box_cases`.
    """
    landmarks = _checked(keypoints)[FACE_ROWS, :2]
    landmarks = landmarks[~np.isnan(landmarks).any(axis=1)]
    if not len(landmarks):
        return None
    left, top = landmarks.min(axis=0).tolist()
    right, bottom = landmarks.max(axis=0).tolist()
    growth = math.sqrt(area_factor) - 1  # added share of each side
    added_width, added_height = (right - left) * growth, (bottom - top) * growth
    box = (
        int(max(left - added_width / 2, 0)),
        int(max(top - added_height * _SHARE_ABOVE_FACE, 0)),
        int(min(right + added_width / 2, width)),
        int(min(bottom + added_height * (1 - _SHARE_ABOVE_FACE), height)),
    )
    return box if box[0] < box[2] and box[1] < box[3] else None


def crop_face(frame_u8: FrameU8, box: Box | None, size: int = FACE_CROP_SIZE) -> FrameU8:
    """Square face picture of one frame; its sides are stretched independently.

    Args:
        frame_u8: [H, W, 3] uint8 RGB, the frame before any letterboxing.
        box: (x0, y0, x1, y1) inside the frame, not empty; None where there is no face.
        size: Side of the picture [px].

    Returns:
        [size, size, 3] uint8 RGB; black for None, the network's own value for "no expression".

    Source: pose page section 7.
    """
    if box is None:
        return np.zeros((size, size, 3), np.uint8)
    x0, y0, x1, y1 = box
    return _resized(frame_u8[y0:y1, x0:x1], size, size)


def letterbox_frame(frame_u8: FrameU8, canvas: Size) -> FrameU8:
    """A frame fitted inside a canvas with black margins: the released order, draw first, then fit.

    Args:
        frame_u8: [H, W, 3] uint8 RGB.
        canvas: (height, width) of the result [px].

    Returns:
        [canvas height, canvas width, 3] uint8 RGB.

    Source: pose page section 4.1; `letterbox_cases`.
    """
    top, left, height, width = contain_box(frame_u8.shape[0], frame_u8.shape[1], *canvas)
    letterboxed: FrameU8 = np.zeros((*canvas, 3), np.uint8)
    letterboxed[top : top + height, left : left + width] = _resized(frame_u8, height, width)
    return letterboxed


def _checked(keypoints: FloatArray) -> NDArray[np.float64]:
    """A float64 copy with NaN in rows that cannot be drawn, so that means with them are NaN too."""
    if keypoints.shape != (NUM_KEYPOINTS, 3):
        raise ValueError(f"keypoints must be [{NUM_KEYPOINTS}, 3], got {list(keypoints.shape)}")
    rows = np.array(keypoints, np.float64)
    drawable = np.isfinite(rows).all(axis=1) & (np.abs(rows[:, :2]) <= FARTHEST_PX).all(axis=1)
    rows[~drawable] = np.nan
    return rows


def _draw_body(canvas: FrameU8, joints: NDArray[np.float64], stroke: int, threshold: float) -> None:
    """Limbs first, joints over them; what lies outside is clipped by OpenCV."""
    points = [
        (x, y) if score >= threshold and not math.isnan(x) else None
        for x, y, score in joints.tolist()
    ]
    for start_index, end_index, rgb in _LIMBS:
        start, end = points[start_index], points[end_index]
        if start is None or end is None:
            continue
        # A limb is a thin ellipse with pointed ends; `cv2.ellipse` fills other pixels than this.
        outline = cv2.ellipse2Poly(
            (int((start[0] + end[0]) / 2), int((start[1] + end[1]) / 2)),
            (int(math.dist(start, end) / 2), stroke),
            int(math.degrees(math.atan2(start[1] - end[1], start[0] - end[0]))),
            arcStart=0,
            arcEnd=360,
            delta=1,
        )
        cv2.fillConvexPoly(canvas, np.asarray(outline, np.int32), rgb)
    for point, rgb in zip(points, _JOINT_RGB, strict=True):
        if point is not None:
            cv2.circle(canvas, (int(point[0]), int(point[1])), stroke, rgb, thickness=-1)


def _draw_hand(canvas: FrameU8, rows: NDArray[np.float64], stroke: int, threshold: float) -> None:
    """Finger bones first, dots over them."""
    # The released border test, which the body does not have: nothing in row or column 0 or before,
    # no test at the far edges. A comparison with NaN is false, which drops the missing points.
    points = [
        (int(x), int(y)) if score >= threshold and x >= 1 and y >= 1 else None
        for x, y, score in rows.tolist()
    ]
    for start_index, end_index, rgb in _HAND_EDGES:
        start, end = points[start_index], points[end_index]
        if start is not None and end is not None:
            cv2.line(canvas, start, end, rgb, thickness=stroke)
    for point in points:
        if point is not None:
            cv2.circle(canvas, point, stroke, _HAND_DOT_RGB, thickness=-1)


def _resized(frame_u8: FrameU8, height: int, width: int) -> FrameU8:
    """Bilinear resize; OpenCV wants (width, height)."""
    resized: FrameU8 = np.asarray(
        cv2.resize(frame_u8, (width, height), interpolation=_BILINEAR), np.uint8
    )
    return resized
