"""What a key is called here: the words of other trainers, and a name typed without its place, answered with the nearest key."""

from __future__ import annotations

import re
from collections.abc import Iterable

from cmt_fast.config import describe
from cmt_fast.config.errors import nearest
from cmt_fast.config.schema import STAGES

# a key (or what to do) -> how others call it: EDM, EDM2, StyleGAN, DiT, SiT, REPA, guided-diffusion, diffusers, timm, Lightning
OTHERS = {
    "STAGE.batch": "batch_size bs global_batch_size train_batch_size total_batch_size batchsize",
    "STAGE.micro_batch": "batch_gpu microbatch micro_batch_size per_gpu_batch_size accumulate grad_accum "
    "gradient_accumulation_steps accum_iter accumulate_grad_batches grad_accum_steps",
    "STAGE.lr": "learning_rate base_lr blr max_lr peak_lr",
    "STAGE.images_nimg (steps x batch)": "steps max_steps num_steps total_steps train_steps max_train_steps iterations iters "
    "n_iters num_iterations lr_anneal_steps max_iter",
    "STAGE.images_nimg (epochs x rows)": "epochs max_epochs num_epochs n_epochs num_train_epochs",
    "STAGE.images_nimg (1000 a kimg)": "kimg total_kimg duration duration_nimg total_nimg",
    "STAGE.precision=fp16": "fp16 use_fp16 loss_scaling loss_scale float16",
    "STAGE.precision=bf16": "half amp use_amp mixed_precision bf16 dtype autocast bfloat16 allow_tf32 tf32",
    "STAGE.ema=[{kind: constant, beta: 0.999}]": "ema_decay ema_rate ema_beta ema_halflife ema_halflife_kimg ema_halflife_nimg "
    "use_ema model_ema_decay ema",
    "STAGE.betas": "beta1 beta2 adam_beta1 adam_beta2 adam_betas",
    "STAGE.weight_decay": "wd adam_weight_decay",
    "STAGE.grad_clip_norm": "clip_grad max_grad_norm grad_clip gradient_clip_val clip_grad_norm gradient_clipping",
    "STAGE.warmup_nimg": "warmup warmup_steps lr_warmup_steps warmup_epochs lr_rampup_kimg rampup lr_warmup",
    "STAGE.lr_schedule": "lr_scheduler scheduler sched decay_lr lr_decay",
    "STAGE.lr_knee_nimg": "lr_ref_nimg ref_batches decay_batches ref_lr_nimg",
    "STAGE.optimizer": "optim opt optimizer_type optimiser",
    "STAGE.label_dropout": "class_dropout_prob cfg_dropout label_drop_prob p_uncond uncond_prob cfg_prob class_dropout",
    "STAGE.objective.mean and STAGE.objective.std": "p_mean p_std time_mu time_sigma mu_t sigma_t",
    "STAGE.objective.kind": "loss loss_type objective_type precond",
    "STAGE.trajectories.guidance (in training), sampler.guidance (in sampling)": "cfg_scale guidance_scale cfg guidance_weight "
    "cfg_w omega_cfg w_cfg",
    "STAGE.start (an earlier stage), or import weights with `cmt ckpt import`": "pretrained init_from load_from finetune "
    "pretrained_model_path transfer init_checkpoint ckpt checkpoint ckpt_path",
    "STAGE.checkpoint_every_nimg": "save_every save_interval ckpt_every checkpoint_every save_steps checkpointing_steps "
    "state_dump_ticks dump checkpoint_nimg",
    "STAGE.snapshot_every_nimg": "snap snapshot_ticks network_snapshot_ticks snapshot_nimg",
    "STAGE.eval_every_nimg": "eval_every eval_interval eval_steps validation_steps eval_freq",
    "STAGE.grid_every_nimg": "sample_every image_snapshot_ticks sampling_steps sample_interval",
    "model.size": "model_size network arch model_name variant",
    "model.kind": "model_type backbone architecture",
    "model.conditional (of a U-Net; a dit follows the labels of its data)": "class_cond cond class_conditional",
    "data.expects.classes": "num_classes n_classes label_dim nb_classes class classes",
    "model.width": "hidden_size hidden_dim cbase model_channels num_channels embed_dim channels",
    "model.depth": "num_layers n_layers layers",
    "model.heads": "num_heads n_heads",
    "model.patch": "patch_size",
    "model.multipliers": "channel_mult cres dim_mults",
    "model.blocks": "num_blocks num_res_blocks",
    "model.attention": "attn_resolutions attention_resolutions",
    "model.dropout": "dropout_rate drop",
    "model.checkpoint_activations": "gradient_checkpointing grad_checkpointing use_checkpoint use_checkpointing grad_ckpt",
    "data.path": "data_path data_dir dataset datadir train_data_dir root dataroot data_root feature_path",
    "data.flip": "xflip mirror hflip random_flip horizontal_flip",
    "`cmt data encode --size`, which makes the store": "image_size img_size resolution size res",
    "data.mean, data.std and data.scale": "latents_scale latents_bias raw_mean raw_std scaling_factor latent_scale",
    "eval.steps": "num_sampling_steps sampling_timesteps num_inference_steps sampling_num_steps mid_t",
    "eval.n": "num_fid_samples num_samples n_samples fid_samples num_images",
    "eval.metric": "metrics fid",
    "eval.reference": "ref_path ref ref_stats fid_stats fid_reference",
    "eval.vae": "vae_path vae_ckpt autoencoder vae_model",
    "sampler.mid_times": "mid_ts t_mid intermediate_t",
    "sampler.t_max": "sigma_max",
    "sampler.t_min": "sigma_min",
    "sampler.solver": "sampler_type sampling_method ode_solver",
    "seed": "global_seed random_seed manual_seed",
    "loader.kind=dali with loader.threads and loader.workers": "num_workers workers n_workers dataloader_num_workers",
    "loggers=[wandb]": "wandb use_wandb wandb_project wandb_run_name",
    "loggers=[tensorboard]": "logger report_to log_with",
    "loggers=[mlflow]": "mlflow use_mlflow",
    "engine=zero": "deepspeed fsdp strategy use_deepspeed",
    "STAGE.compile": "torch_compile use_compile compile_model",
    "--out RUN": "outdir output_dir results_dir logdir workdir log_dir save_dir out_dir out output",
    "--out RUN with the same command again: it goes on from the last checkpoint": "resume resume_from resume_pkl "
    "resume_checkpoint resume_from_checkpoint auto_resume continue",
    "`torchrun --nproc-per-node N -m cmt_fast train ...`": "gpus num_gpus n_gpus nproc world_size devices ngpu num_processes",
    "`cmt eval` or `cmt sample`, which have --steps, -n and --seed": "sample evaluate",
}
KEY = re.compile(r"(STAGE|[a-z_]+)(\.[a-z_]+)*(?=$|=| )")
HERE = {word: target for target, words in OTHERS.items() for word in words.split()}


def plain(word: str) -> str:
    """A name without the habits of command lines: `--Batch-Size` is batch_size."""
    return re.sub(r"[-\s]+", "_", word.strip().lstrip("-+")).lower()


def answer(name: str, valid: Iterable[str] = (), value: str = "") -> str:
    """What a key that is not there was meant as, "" where nothing is known of it: a key of this name at another place, or
    of another kind at this one, or the word of another trainer.

    name: as typed, dotted; valid: the keys that its place has; value: what was to be set, put behind a key that is proposed.
    """
    parents, _, last = plain(name).rpartition(".")
    if last in set(valid):
        return f"did you mean {f'{parents}.' * bool(parents)}{last}?"
    here = [k.kind for k in describe.every() if k.name == describe.general(plain(name)) and k.kind]
    if here:
        return f"it is a key of kind {' or '.join(here)}"
    found = [HERE[last]] if last in HERE else []
    found += [p for p in describe.places(last) if not any(p in target for target in found)]
    stage = parents.partition(".")[0]
    if stage in STAGES:
        found = [p for p in found if p.startswith(describe.STAGE)] or found
    if not found:
        return ""
    if not KEY.match(found[0]):
        return f"here it is {found[0]}"
    stage, each = (stage, "") if stage in STAGES else ("post", f" ({', '.join(STAGES)} each have their own)")
    each = each if any(describe.STAGE in p for p in found) else ""
    found = [p + f"={value}" * bool(value and KEY.fullmatch(p)) for p in found]
    return f"did you mean {' or '.join(p.replace(describe.STAGE, stage) for p in found)}?{each}"


def unknown(key: str, valid: list[str]) -> str:
    """The line of a key that the schema has not: what it was meant as, else what is valid there and what is nearest."""
    meant = answer(key, valid)
    near = nearest(key.rpartition(".")[2], valid)
    return f"unknown key; {meant}" if meant else f"unknown key; valid are {', '.join(valid)}{near}"


def command_line(option: str, value: str) -> str:
    """What an option that is no option was meant as: a recipe's key, with its value where one followed; "" where none is near."""
    word, equals, inline = option.partition("=")
    value = inline if equals else value
    name = plain(word)
    known = {k.name for k in describe.every()}
    known |= {k.name.replace(describe.STAGE, s, 1) for k in describe.every() for s in STAGES}
    if name in known:
        return f"; did you mean {name}={value or 'VALUE'}, without dashes?"
    said = answer(name, value=value)
    if not said:
        return ""
    form = "" if said.startswith("here") else " Keys of the recipe are set as a.b=value, without dashes"
    return f"; {said}{form}"
