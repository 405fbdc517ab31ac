"""Edges of renders, noise and waves, rotations as products of three, and errors by the matrix logarithm."""

import numpy as np
import torch

from posterity.generative import Pose, edge_map, pose_error, rotation

AGAINST = "cv2.Canny(image, 100, 200) of OpenCV on images of 8 bits, and scipy.linalg.logm as the authors' code calls it"


def pose(angles):
    azimuth, elevation, theta = torch.tensor(angles).unbind(1)
    return Pose(azimuth, elevation, theta, torch.full_like(azimuth, 4.0))


def pairs(stored):
    """Yield what is compared: name, ours, theirs, allowed difference."""
    for name in ("renders", "noise", "smooth"):
        for dtype in (torch.float32, torch.float64):
            found = edge_map(torch.from_numpy(stored[name]).to(dtype) / 255)[:, 0]
            theirs = np.unpackbits(stored[f"{name}_edges"], count=found.numel()).reshape(found.shape)
            yield f"edges of {name}, {dtype}", found.double(), theirs.astype(float), 0.0
    yield "rotation", rotation(pose(stored["a"])), stored["rotation"], 1e-14
    yield "pose error", pose_error(pose(stored["a"]), pose(stored["b"])), stored["error"], 1e-8
