"""Settings of ``sample`` that make rounds of different kinds."""

from __future__ import annotations

from free_kernels import DDPMSchedule, Relaxation

SETTINGS = {
    "learned": {},
    "frozen": {"drafter": "frozen"},
    "guided": {"guidance_scale": 2.5},
    "guided, frozen": {"guidance_scale": 2.5, "drafter": "frozen"},
    "block": {"verification": "block"},
    "relaxed": {"relaxation": Relaxation(4.0)},
    "refilled": {"max_slots": 2},
    "refilled, relaxed": {"max_slots": 2, "relaxation": Relaxation(4.0)},
    "without old rows": {"reuse_refused": False},
    "clipped": {"schedule": DDPMSchedule(20, clip_denoised=True)},
    "one variance": {"schedule": DDPMSchedule(20, variance="fixed_small")},
}
