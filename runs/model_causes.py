"""Causes of failures that the last line of an error does not name, for the table of model types."""

PAIRS, VIDEOS, SERIES = "reads pairs of images", "reads videos", "reads time series"
BOXES, STREAM, CODES = (
    "reads boxes (bbox)",
    "reads text and images in one stream",
    "reads several codes for each position of sound",
)
# What a type reads besides the inputs that nearplane makes.
OTHER_INPUTS = {
    "audioflamingo3_encoder": "reads input_features_mask",
    "autoformer": SERIES,
    "blip-2": "reads an image together with placeholder tokens for it",
    "bridgetower": STREAM,
    "bros": BOXES,
    "deepseek_ocr2_vision": "reads states of the SAM encoder that goes before",
    "dia": CODES,
    "efficientloftr": PAIRS,
    "idefics": STREAM,
    "informer": SERIES,
    "inkling_vision": "reads patches of images",
    "instructblip": "reads an image and two texts (qformer_input_ids)",
    "instructblipvideo": "reads a video and two texts (qformer_input_ids)",
    "kosmos-2": STREAM,
    "lightglue": PAIRS,
    "lxmert": "reads features of detected objects (visual_feats)",
    "minicpm_ocr_vision": "reads target_sizes",
    "minicpmv4_7_vision": "reads target_sizes",
    "molmo2_vision": "reads patches of images",
    "musicgen": CODES,
    "musicgen_decoder": CODES,
    "musicgen_melody": CODES,
    "musicgen_melody_decoder": CODES,
    "paddleocr_vl_vision": "reads patches of images",
    "pe_audio": "reads text and sound",
    "pe_audio_video": VIDEOS,
    "pe_audio_video_encoder": VIDEOS,
    "pe_video": VIDEOS,
    "pe_video_encoder": VIDEOS,
    "perceiver": "reads inputs, whose form a preprocessor of its own decides",
    "qwen3_omni_moe_talker_code_predictor": "reads states of the talker (inputs_embeds)",
    "rag": "reads documents that a retriever finds (context_input_ids)",
    "sam3": "reads an image and a text or boxes that prompt it",
    "siglip2": "reads patches with spatial_shapes",
    "superglue": PAIRS,
    "time_series_transformer": SERIES,
    "tvp": VIDEOS,
    "udop": BOXES,
    "videoprism": VIDEOS,
    "vilt": STREAM,
    "voxtral_realtime": "reads sound and text together",
}
# Others: the sort of failure (``SORTS`` in models.py) and its cause.
CAUSES: dict[str, tuple[str, str]] = {}
