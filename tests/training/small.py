"""A Specks model small enough to train a few steps in a test."""

from functools import cache

import jax

from jaxvqa.decoder import DecoderConfig
from jaxvqa.models.llava import LlavaConfig
from jaxvqa.specks.tokenizer import IMAGE, train_tokenizer
from jaxvqa.training import specks
from jaxvqa.vision.clip import ClipConfig

TOKENIZER = train_tokenizer()
WORDS = specks.Words.of(TOKENIZER)
CONFIG = LlavaConfig(
    vision=ClipConfig(128, 8, 32, 64, 2, 2, 1e-5, "quick_gelu"),
    decoder=DecoderConfig(
        num_layers=2,
        width=32,
        mlp_width=64,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=TOKENIZER.get_vocab_size(),
        max_length=1024,
        rope_theta=10000.0,
        rope_factor=1.0,
        norm_eps=1e-5,
        qkv_bias=False,
        qk_norm=False,
        tied=True,
    ),
    image_token_id=TOKENIZER.token_to_id(IMAGE),
    feature_layers=(-1,),
    select="default",
    projector_activation="gelu",
    projector_bias=True,
)


@cache
def initialised() -> specks.Trained:
    return specks.initialise(CONFIG, WORDS, jax.random.key(0))
