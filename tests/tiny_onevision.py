"""Tiny random LLaVA-OneVision and LLaVA-NeXT folders, written without torch; see `tiny`."""

from pathlib import Path

import numpy as np
from tiny import (
    IMAGE_TOKEN_ID,
    LAYOUTS,
    VOCABULARY,
    bias,
    byte_level_bpe,
    clip_tensors,
    llama_tensors,
    matrix,
    write_json,
    write_preprocessor,
    write_tokenizer,
    write_weights,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<video>", "<image>")
"""The last tokens of OneVision's vocabulary: `<image>` is the last but one of VOCABULARY, as in `tiny`."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for content in message['content'] %}{% if content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""What transformers' conversion of the original checkpoints writes, in other words."""


def tiny_onevision(
    folder: str | Path,
    *,
    is_next: bool = False,
    text_model: str = "qwen2",
    layout: str = "v4",
    num_kv_heads: int = 2,
    tied: bool = False,
    image_size: int = 30,
    patch_size: int = 7,
    most_tiles: int = 3,
    max_tiles: int = 2,
    vision_layers: int = 3,
    feature_layer: int | list[int] = -1,
    text_layers: int = 3,
    width: int = 32,
    num_heads: int = 4,
    use_head: bool = False,
    dtype: str = "float32",
    seed: int = 0,
) -> Path:
    """Write a random folder: config, weights, tokenizer, processor; the same arguments give the same bytes.

    is_next: LLaVA-NeXT, with a CLIP tower. text_model: "qwen2", "llama" or "mistral".
    most_tiles: the canvases are all of up to so many tiles in height and width; max_tiles: the N of anyres_max_N.
    layout: a key of `tiny.LAYOUTS` of transformers. use_head: SigLIP's pooling head is in the folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    vision = dict(width=24, mlp=40, layers=vision_layers, heads=2, image=image_size, patch=patch_size)
    text = dict(width=width, mlp=48, layers=text_layers, heads=num_heads, kv_heads=num_kv_heads, head_dim=8)
    sides = [image_size * n for n in range(1, most_tiles + 1)]
    canvases = [[height, width] for height in sides for width in sides]

    language_prefix, head_prefix, vision_prefix, projector_prefix = LAYOUTS[layout]
    tower = clip_tensors(rng, vision) if is_next else siglip_tensors(rng, vision, use_head)
    tensors = {vision_prefix + name: value for name, value in tower.items()}
    features = vision["width"] * (1 if isinstance(feature_layer, int) else len(feature_layer))
    tensors |= {
        projector_prefix + "linear_1.weight": matrix(rng, width, features),
        projector_prefix + "linear_1.bias": bias(rng, width),
        projector_prefix + "linear_2.weight": matrix(rng, width, width),
        projector_prefix + "linear_2.bias": bias(rng, width),
        ("model." if layout == "v5-modules" else "") + "image_newline": 10 * bias(rng, width),
    }
    language = llama_tensors(rng, text, VOCABULARY, text_model)
    tensors |= {language_prefix + name: value for name, value in language.items()}
    if not tied:
        tensors[head_prefix + "weight"] = matrix(rng, VOCABULARY, width)

    decoder = dict(
        model_type=text_model, hidden_size=width, intermediate_size=48, num_hidden_layers=text_layers,
        num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, vocab_size=VOCABULARY, hidden_act="silu",
        rms_norm_eps=1e-6, max_position_embeddings=2048, tie_word_embeddings=tied, rope_theta=1000000.0,
        **({"sliding_window": None} if text_model == "mistral" else {}),
    )  # fmt: skip
    encoder = dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=vision_layers, num_attention_heads=2,
        image_size=image_size, patch_size=patch_size,
    )  # fmt: skip
    config = dict(
        text_config=decoder, image_token_index=IMAGE_TOKEN_ID, projector_hidden_act="gelu", dtype=dtype,
        multimodal_projector_bias=True, vision_feature_layer=feature_layer, image_grid_pinpoints=canvases,
        tie_word_embeddings=tied,
    )  # fmt: skip
    if is_next:
        config |= dict(
            architectures=["LlavaNextForConditionalGeneration"], model_type="llava_next",
            vision_feature_select_strategy="default", vision_config=encoder | dict(model_type="clip_vision_model"),
        )  # fmt: skip
        write_tokenizer(folder)
    else:
        config |= dict(
            architectures=["LlavaOnevisionForConditionalGeneration"], model_type="llava_onevision",
            vision_aspect_ratio=f"anyres_max_{max_tiles}", video_token_index=IMAGE_TOKEN_ID - 1,
            vision_feature_select_strategy="full",
            vision_config=encoder | dict(model_type="siglip_vision_model", vision_use_head=use_head),
        )  # fmt: skip
        write_qwen_tokenizer(folder)
    write_json(folder / "config.json", config)
    write_tile_processor(folder, image_size, patch_size, canvases, None if is_next else max_tiles)
    write_weights(folder, tensors, dtype)
    return folder


def siglip_tensors(rng, c, head):
    """CLIP's names, but for a class token and a norm before the blocks, with a bias of the patches."""
    tensors = clip_tensors(rng, c)
    for name in ("embeddings.class_embedding", "pre_layrnorm.weight", "pre_layrnorm.bias"):
        del tensors[name]
    positions = "embeddings.position_embedding.weight"
    tensors[positions] = tensors[positions][1:]
    tensors["embeddings.patch_embedding.bias"] = bias(rng, c["width"])
    if head:
        width, mlp = c["width"], c["mlp"]
        tensors |= {
            "head.probe": matrix(rng, 1, 1, width),
            "head.attention.in_proj_weight": matrix(rng, 3 * width, width),
            "head.attention.in_proj_bias": bias(rng, 3 * width),
            "head.attention.out_proj.weight": matrix(rng, width, width),
            "head.attention.out_proj.bias": bias(rng, width),
            "head.layernorm.weight": bias(rng, width),
            "head.layernorm.bias": bias(rng, width),
            "head.mlp.fc1.weight": matrix(rng, mlp, width),
            "head.mlp.fc1.bias": bias(rng, mlp),
            "head.mlp.fc2.weight": matrix(rng, width, mlp),
            "head.mlp.fc2.bias": bias(rng, width),
        }
    return tensors


def write_qwen_tokenizer(folder):
    """A byte-level BPE without a token of beginning; then Qwen's special tokens and `<image>`."""
    from tokenizers import AddedToken

    tokenizer = byte_level_bpe(IMAGE_TOKEN_ID + 1 - len(SPECIAL))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        model_max_length=2048, clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE,
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
    ))  # fmt: skip


def write_tile_processor(folder, image_size, patch_size, canvases, max_tiles):
    """The image processor; LLaVA-NeXT's where `max_tiles` is None."""
    square = {"height": image_size, "width": image_size}
    common = dict(do_pad=True, image_grid_pinpoints=canvases)
    if max_tiles is None:
        write_preprocessor(
            folder, image_processor_type="LlavaNextImageProcessor", size={"shortest_edge": image_size},
            do_center_crop=True, crop_size=square, **common,
        )  # fmt: skip
        write_json(folder / "processor_config.json", dict(
            processor_class="LlavaNextProcessor", image_token="<image>", patch_size=patch_size,
            vision_feature_select_strategy="default", num_additional_image_tokens=1,
        ))  # fmt: skip
        return
    write_preprocessor(
        folder, image_processor_type="LlavaOnevisionImageProcessor", size=square, image_mean=[0.5] * 3,
        image_std=[0.5] * 3, **common,
    )  # fmt: skip
    write_json(folder / "processor_config.json", dict(
        processor_class="LlavaOnevisionProcessor", image_token="<image>", video_token="<video>",
        num_image_tokens=(image_size // patch_size) ** 2, vision_feature_select_strategy="full",
        vision_aspect_ratio=f"anyres_max_{max_tiles}",
    ))  # fmt: skip
