"""The numbers every part of the system agrees on. They stand here once (docs/conventions.md explains them)."""

FPS = 25  # frames a second of every data set and every rendered video
SAMPLE_RATE = 16_000  # audio samples a second, mono
SAMPLES_PER_FRAME = SAMPLE_RATE // FPS  # 640
MISSING_ROWS = 2  # frames at the end of a clip that may have no sound: containers are not cut to the frame
DM_PER_M = 10.0  # the world is in decimetres, transforms_*.json in metres
IMAGE_SIZE = 512  # default side of a data set's frames, pixels
TRAIN_SPLIT = (10, 11)  # the first int(F * 10 / 11) valid frames train, the rest validate

NEAR, FAR = 0.2, 100.0  # the rasterizer's near cull and the depth range of the distortion map, dm

# CelebAMask-HQ classes, the pixel values of parsing/{i}.png
CLASS_NAMES = (
    "background", "skin", "left_brow", "right_brow", "left_eye", "right_eye", "glasses", "left_ear", "right_ear",
    "earring", "nose", "mouth", "upper_lip", "lower_lip", "neck", "necklace", "cloth", "hair", "hat",
)  # fmt: skip
BACKGROUND, SKIN, MOUTH, UPPER_LIP, LOWER_LIP, NECK, NECKLACE, CLOTH, HAIR, HAT = 0, 1, 11, 12, 13, 14, 15, 16, 17, 18
EARS = (7, 8)
FACE_CLASSES = tuple(range(1, 14))
HEAD_CLASSES = FACE_CLASSES + (HAIR, HAT)
NECK_CLASSES = (NECK, NECKLACE)
TORSO_CLASSES = (CLOTH,)
# what --part selects: face with ears; with hair and hat; with neck and clothes
PART_CLASSES = {
    "face": FACE_CLASSES,
    "head": HEAD_CLASSES,
    "all": HEAD_CLASSES + NECK_CLASSES + TORSO_CLASSES,
}

# columns of bs.npy (ARKit order: MediaPipe's without _neutral, with a zero tongueOut at the end)
UPPER_FACE_COLUMNS = (0, 1, 2, 3, 4, 8, 9)
UPPER_FACE_NAMES = (
    "browDownLeft", "browDownRight", "browInnerUp", "browOuterUpLeft", "browOuterUpRight", "eyeBlinkLeft",
    "eyeBlinkRight",
)  # fmt: skip
BLINK_COLUMNS = (8, 9)
JAW_OPEN_COLUMN = 24
