"""What each key of a published config means to us: tables of those we read, we check, and that change nothing.

In: nothing. Out: the tables that `convert.configs` goes by. A key that stands in none of them is named to the user.
Sources: the signatures of diffusers' FluxTransformer2DModel, AutoencoderKL and FlowMatchEulerDiscreteScheduler, and of
transformers' T5Config and CLIPTextConfig; a test compares the defaults with them.
"""

from typing import Any

# our field -> (their key, their default)
FIELDS: dict[str, dict[str, tuple[str, Any]]] = {
    "transformer": {
        "in_channels": ("in_channels", 64),
        "num_heads": ("num_attention_heads", 24),
        "num_double_blocks": ("num_layers", 19),
        "num_single_blocks": ("num_single_layers", 38),
        "text_dim": ("joint_attention_dim", 4096),
        "pooled_dim": ("pooled_projection_dim", 768),
        "axes_dim": ("axes_dims_rope", [16, 56, 56]),
        "guidance_embeds": ("guidance_embeds", False),
    },
    "t5": {
        "vocab_size": ("vocab_size", 32128),
        "d_model": ("d_model", 512),
        "d_ff": ("d_ff", 2048),
        "num_heads": ("num_heads", 8),
        "head_dim": ("d_kv", 64),
        "num_layers": ("num_layers", 6),
        "num_buckets": ("relative_attention_num_buckets", 32),
        "max_distance": ("relative_attention_max_distance", 128),
        "eps": ("layer_norm_epsilon", 1e-6),
    },
    "clip": {
        "vocab_size": ("vocab_size", 49408),
        "hidden_size": ("hidden_size", 512),
        "mlp_dim": ("intermediate_size", 2048),
        "num_heads": ("num_attention_heads", 8),
        "num_layers": ("num_hidden_layers", 12),
        "max_positions": ("max_position_embeddings", 77),
        "eos_token_id": ("eos_token_id", 49407),
        "eps": ("layer_norm_eps", 1e-5),
        "activation": ("hidden_act", "quick_gelu"),
    },
    "vae": {
        "image_channels": ("in_channels", 3),
        "latent_channels": ("latent_channels", 4),
        "channels": ("block_out_channels", [64]),
        "layers_per_block": ("layers_per_block", 1),
        "norm_groups": ("norm_num_groups", 32),
        "scaling_factor": ("scaling_factor", 0.18215),
        "shift_factor": ("shift_factor", None),
    },
    "scheduler": {
        "base_seq_len": ("base_image_seq_len", 256),
        "max_seq_len": ("max_image_seq_len", 4096),
        "base_shift": ("base_shift", 0.5),
        "max_shift": ("max_shift", 1.15),
        "use_dynamic_shifting": ("use_dynamic_shifting", False),
    },
}
HEAD_DIM = ("attention_head_dim", 128)  # of the transformer: its width is this times the heads

# their key -> (their default, the values that our modules implement)
MUST: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "transformer": {"_class_name": (None, (None, "FluxTransformer2DModel")), "patch_size": (1, (1,))},
    "t5": {
        "model_type": (None, (None, "t5")),
        "is_gated_act": (False, (True,)),
        "dense_act_fn": ("relu", ("gelu_new", "gelu_pytorch_tanh")),
        "pruned_heads": (None, (None, {})),
    },
    "clip": {
        "model_type": (None, (None, "clip_text_model", "clip")),
        "hidden_act": ("quick_gelu", ("quick_gelu", "gelu")),
        "pruned_heads": (None, (None, {})),
    },
    "vae": {
        "_class_name": (None, (None, "AutoencoderKL")),
        "act_fn": ("silu", ("silu", "swish")),
        "out_channels": (3, (3,)),
        "mid_block_add_attention": (True, (True,)),
        "use_quant_conv": (True, (False,)),
        "use_post_quant_conv": (True, (False,)),
        "latents_mean": (None, (None,)),
        "latents_std": (None, (None,)),
    },
    "scheduler": {
        "_class_name": (None, (None, "FlowMatchEulerDiscreteScheduler")),
        "num_train_timesteps": (1000, (1000,)),
        "invert_sigmas": (False, (False,)),
        "shift_terminal": (None, (None,)),
        "use_karras_sigmas": (False, (False, None)),
        "use_exponential_sigmas": (False, (False, None)),
        "use_beta_sigmas": (False, (False, None)),
        "time_shift_type": ("exponential", ("exponential",)),
        "stochastic_sampling": (False, (False,)),
    },
}
BLOCKS = {
    "down_block_types": "DownEncoderBlock2D",
    "up_block_types": "UpDecoderBlock2D",
}  # one for each of VAE's levels

# second names that transformers has for a key
ALIASES = {
    "t5": {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }
}
# where a config of more than the one tower has the tower's own
NESTED = {"t5": ("encoder", "text_config"), "clip": ("text_config",)}

DIFFUSERS = {"_diffusers_version", "_name_or_path", "_use_default_values", "_commit_hash"}
OF_TRANSFORMERS = """
_name_or_path _commit_hash _attn_implementation _attn_implementation_autoset _attn_implementation_internal
_output_attentions architectures attn_implementation dtype torch_dtype transformers_version model_type
initializer_factor initializer_range attention_dropout classifier_dropout dropout dropout_rate
bos_token_id decoder_start_token_id pad_token_id sep_token_id projection_dim tokenizer_class
add_cross_attention cross_attention_hidden_size is_decoder is_encoder_decoder num_decoder_layers
scale_decoder_outputs tie_encoder_decoder tie_word_embeddings
chunk_size_feed_forward gradient_checkpointing n_positions output_attentions output_hidden_states output_past
output_scores problem_type return_dict return_dict_in_generate tf_legacy_loss torchscript use_bfloat16 use_cache
finetuning_task id2label label2id num_labels prefix task_specific_params
bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
no_repeat_ngram_size num_beam_groups num_beams num_return_sequences remove_invalid_values repetition_penalty
suppress_tokens temperature top_k top_p typical_p
"""
TRANSFORMERS: set[str] = set(OF_TRANSFORMERS.split())
# keys that change no number of what we compute: names, versions, dropout, the decoder's, a generation's of text
HARMLESS: dict[str, set[str]] = {
    "transformer": DIFFUSERS,
    "t5": TRANSFORMERS | {"eos_token_id", "feed_forward_proj"},
    "clip": TRANSFORMERS,
    "vae": DIFFUSERS | {"force_upcast", "sample_size"},
    "scheduler": DIFFUSERS | {"shift"},
}
WHOLE_CLIP = {
    "vision_config",
    "vision_config_dict",
    "text_config_dict",
    "logit_scale_init_value",
}  # beside `text_config`

# what diffusers and transformers want to see beside the fields, when a folder is written for them
WRITTEN: dict[str, dict[str, Any]] = {
    "transformer": {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30.0", "patch_size": 1},
    "t5": {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "is_gated_act": True,
        "dense_act_fn": "gelu_new",
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
    "clip": {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": 0,
        "pad_token_id": 1,
        "attention_dropout": 0.0,
        "dropout": 0.0,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.30.0",
        "act_fn": "silu",
        "mid_block_add_attention": True,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": True,
        "sample_size": 1024,
    },
    "scheduler": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": "0.30.0",
        "num_train_timesteps": 1000,
    },
}

# model_index.json: pipelines whose transformer draws from text alone, and what each takes besides
FROM_TEXT = {
    "FluxPipeline": "",
    "FluxImg2ImgPipeline": "a picture to begin with",
    "FluxInpaintPipeline": "a picture to fill in",
    "FluxKontextPipeline": "a picture to change",
    "FluxKontextInpaintPipeline": "a picture to change",
    "FluxControlNetPipeline": "a ControlNet",
    "FluxControlNetImg2ImgPipeline": "a ControlNet and a picture",
    "FluxControlNetInpaintPipeline": "a ControlNet and a picture",
}
# in_channels of the released transformers that take more than the noisy latents
WIDER = {384: "FLUX.1 Fill, which fills in pictures", 128: "FLUX.1 Canny or Depth, which draw along a picture"}
INDEX = {"_class_name", "_diffusers_version", "_name_or_path", "scheduler", "tokenizer", "tokenizer_2"}
