"""The stages whose step is captured in tests/engine/test_step_graph.py: every objective, and what a step may have beside it."""

from __future__ import annotations

from tests.models.test_unets import RECIPES as UNETS

ALONE = ["post.anchor=null", "post.trajectories=null", "post.teacher=null"]
TAUGHT = ["post.anchor=null", "post.trajectories=null", "post.teacher=pre"]
FEATURES = "{kind: cmt_cm, distance: latent_lpips}"

# name -> recipe, stage, overrides; FILE: of a classifier's features
CASES: dict[str, tuple[str, str, list[str]]] = {
    "denoise": ("digits", "pre", ["pre.label_dropout=0.2"]),
    "denoise in two parts": ("digits", "pre", ["pre.micro_batch=16"]),
    "denoise in the plane": ("gmm", "pre", []),
    "denoise weighed, dropout": ("digits", "pre", [UNETS["edm2"], "pre.objective={kind: denoise, uncertainty: true}"]),
    "denoise, augmented, dropout": ("digits", "pre", [UNETS["edm"], "pre.augment={p: 0.5}"]),
    "denoise, blocks again": ("digits", "pre", ["model.checkpoint_activations=true", "model.depth=2"]),
    "flow": ("digits-mf", "pre", ["pre.label_dropout=0.2"]),
    "cmt_cm": ("digits", "mid", []),
    "cmt_cm, augmented features": ("digits", "mid", [f"mid.objective={FEATURES}", "mid.perceptual={weights: FILE}"]),
    "cmt_cm, kept features": ("digits", "mid", [f"mid.objective={FEATURES}", "mid.perceptual={weights: FILE, augment: false}"]),
    "cmt_mf": ("digits-mf", "mid", []),
    "cmt_mf, guided, without labels": ("digits-mf", "mid", ["pre.label_dropout=0.1", "mid.label_dropout=0.2",
                                                            "mid.trajectories.guidance=1.5"]),
    "ect": ("digits", "post", [*ALONE, "post.objective={kind: ect, doublings: 3}"]),
    "ect, augmented features": ("digits", "post", [*ALONE, "post.objective={kind: ect, distance: latent_lpips}",
                                                   "post.perceptual={weights: FILE}"]),
    "ect, anchor": ("digits", "post", []),
    "ect, anchor, two parts": ("digits", "post", ["post.micro_batch=16"]),
    "ect, dropout": ("digits", "post", [*ALONE, UNETS["edm"]]),
    "ecd, Heun, guided": ("digits", "post", [*TAUGHT, "post.objective={kind: ecd, step: heun}", "post.teacher_guidance=1.5",
                                             "pre.label_dropout=0.1", "post.label_dropout=0.2"]),
    "meanflow, anchor": ("digits-mf", "post", []),
    "meanflow, guided": ("digits-mf", "post", [*ALONE, "post.label_dropout=0.1",
                                               "post.objective={kind: meanflow, omega: 1.5, kappa: 0.5, guide_t_max: 0.75}"]),
    "imeanflow, anchor": ("digits-mf", "post", ["post.objective={kind: imeanflow}"]),
    "imeanflow, guided, two parts": ("digits-mf", "post", [*ALONE, "post.objective={kind: imeanflow, omega: 1.5}",
                                                           "post.micro_batch=16", "post.label_dropout=0.1"]),
    "imeanflow, told, its head": ("digits-mf", "post", ["model.guided=true", "model.velocity_head=1", "post.label_dropout=0.1",
                                                        "post.objective={kind: imeanflow, head: true, omega_max: 8}"]),
    "sct": ("digits", "post", [*ALONE, "post.objective={kind: sct, warmup_nimg: 100}"]),
    "sct, EDM2, dropout": ("digits", "post", [*ALONE, UNETS["edm2"], "post.objective={kind: sct}"]),
    "imm, two parts": ("digits-mf", "post", [*ALONE, "post.objective={kind: imm}", "post.micro_batch=16"]),
    "drift": ("digits", "post", ["post.objective={kind: drift, space: latent_lpips, group: 8}", "post.perceptual.weights=FILE"]),
    "scd, autoguided": ("digits", "post", [*TAUGHT, "post.objective={kind: scd, warmup_nimg: 100}",
                                           "post.autoguidance={network: elsewhere/pre}"]),
    "sct, learned weights": ("digits", "post", [*ALONE, "model.log_variance=true",
                                                "post.objective={kind: sct, uncertainty: true}"]),
    "ayf, autoguided": ("digits-mf", "post", [*TAUGHT, "post.objective={kind: ayf, warmup: 0.5}",
                                              "post.autoguidance={network: elsewhere/pre}"]),
    "lagrangian, taught": ("digits-mf", "post", [*TAUGHT, "post.objective={kind: lagrangian, velocity: teacher}"]),
    "semigroup, two parts": ("digits-mf", "post", [*ALONE, "post.objective={kind: semigroup}", "post.micro_batch=16"]),
    "shortcut, guided": ("digits-mf", "post", [*ALONE, "post.objective={kind: shortcut, omega: 1.5}",
                                               "post.label_dropout=0.1"]),
    "alphaflow, guided": ("digits-mf", "post", [*ALONE, "post.label_dropout=0.1",
                                                "post.objective={kind: alphaflow, omega: 1.5, kappa: 0.5, gamma: 1}"]),
}  # fmt: skip
