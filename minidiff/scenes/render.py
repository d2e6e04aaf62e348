"""Draws a scene: analytic ray tracing in NumPy, four rays a pixel, each with its own light for soft shadows.

A ray is origin + t * direction; each shape answers with the nearest t > 0 and the surface normal there.
"""

import numpy as np

from minidiff.scenes.world import COLOURS, FLOORS, SIZES, Scene

ELEVATION = 0.63  # radians that the camera looks down
DISTANCE = 9.0  # from the camera to the point that it looks at
FIELD = 0.268  # tangent of half the field of view
TARGET = np.array([0.0, 0.42, 0.0])
LIGHT = np.array([-0.45, 0.95, 0.42])  # towards the light
LIGHT_SPREAD = 0.10  # how far the four light directions lie apart: the softness of shadows
SUN, SKY = 1.15, 0.34  # strength of the light and of the fill from all around
FAR = np.float32(1e9)


def render(scene: Scene, size: int = 128) -> np.ndarray:
    """(size, size, 3) uint8 sRGB picture of the scene, at 2 x 2 rays a pixel."""
    origin, directions = _camera(size)  # (3,), (4, size * size, 3)
    lights = _lights()  # (4, 3)
    light = np.zeros((size * size, 3), np.float32)
    for rays, towards in zip(directions, lights, strict=True):
        light += _shade(scene, origin, rays, towards)
    picture = _srgb(light / len(lights)).reshape(size, size, 3)
    return np.rint(picture * 255).astype(np.uint8)


def _camera(size):
    forward = np.array([0.0, -np.sin(ELEVATION), -np.cos(ELEVATION)])
    right, up = np.array([1.0, 0.0, 0.0]), np.array([0.0, np.cos(ELEVATION), -np.sin(ELEVATION)])
    centres = (np.arange(2 * size) + 0.5) / size - 1  # subpixel centres in [-1, 1]
    rays = []
    for row in (0, 1):
        for column in (0, 1):
            v, u = np.meshgrid(-centres[row::2], centres[column::2], indexing="ij")  # (size, size)
            d = forward + FIELD * (u[..., None] * right + v[..., None] * up)  # (size, size, 3)
            rays.append((d / np.linalg.norm(d, axis=-1, keepdims=True)).reshape(-1, 3))
    return (TARGET - DISTANCE * forward).astype(np.float32), np.asarray(rays, np.float32)


def _lights():
    offsets = np.array([[-1, 0, -1], [1, 0, -0.6], [-0.6, 0, 1], [0.8, 0, 1]]) * LIGHT_SPREAD
    directions = LIGHT + offsets
    return (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)


def _shade(scene, origin, rays, towards):
    """(N, 3) linear light along each ray."""
    nearest = np.where(rays[:, 1] < 0, -origin[1] / np.minimum(rays[:, 1], -1e-6), FAR).astype(
        np.float32
    )  # floor
    normals = np.zeros_like(rays)
    normals[:, 1] = 1.0
    hit = np.full(len(rays), -1)
    for number, solid in enumerate(scene.solids):
        t, n = _intersect(solid, origin, rays)
        closer = t < nearest
        nearest[closer], normals[closer], hit[closer] = t[closer], n[closer], number
    points = origin + nearest[:, None] * rays
    colours = np.array([COLOURS[s.colour] for s in scene.solids] + [FLOORS[scene.floor]], np.float32)[hit]
    lit = np.maximum(normals @ towards, 0.0)
    start = points + 2e-3 * normals
    for solid in scene.solids:
        facing = np.flatnonzero(lit > 0)
        blocked = _intersect(solid, start[facing], np.broadcast_to(towards, (len(facing), 3)))[0] < FAR
        lit[facing[blocked]] = 0.0
    ambient = SKY * _openness(scene, points, normals, hit)
    shade = colours * (SUN * lit + ambient)[:, None]
    half = towards - rays
    half /= np.linalg.norm(half, axis=1, keepdims=True)
    gloss = np.where(hit >= 0, 0.45 * np.maximum((normals * half).sum(1), 0.0) ** 60 * (lit > 0), 0.0)
    outwards = (points[:, 0] ** 2 + points[:, 2] ** 2) / 24.0
    spot = np.where(hit < 0, 1.0 / (1.0 + outwards**2), 1.0)  # the floor darkens away from the middle
    return shade * spot[:, None] + gloss[:, None]


def _openness(scene, points, normals, hit):
    """How much of the sky a point sees, roughly: less beside a solid and on faces that look down."""
    open_sky = 0.5 + 0.5 * normals[:, 1]
    on_floor = hit < 0
    for solid in scene.solids:
        r = SIZES[solid.size]
        away = np.hypot(points[:, 0] - solid.x, points[:, 2] - solid.z)
        open_sky = np.where(on_floor, open_sky * (1 - 0.55 * np.exp(-((away / (1.25 * r)) ** 4))), open_sky)
    return open_sky


def _intersect(solid, origins, rays):
    """((N,) distance or FAR, (N, 3) outward normals) for one solid standing on the floor."""
    r = np.float32(SIZES[solid.size])
    o = np.broadcast_to(origins, rays.shape) - np.array([solid.x, 0.0, solid.z], np.float32)
    return _SHAPES[solid.shape](o, rays, r, solid.yaw)


def _quadratic(a, half_b, c):
    """The smaller and larger root of a t^2 + 2 half_b t + c, FAR where there is none."""
    d = half_b * half_b - a * c
    root = np.sqrt(np.maximum(d, 0.0))
    safe = np.where(np.abs(a) < 1e-9, np.float32(1e-9), a)
    near, far = (-half_b - root) / safe, (-half_b + root) / safe
    return np.where(d > 0, np.minimum(near, far), FAR), np.where(d > 0, np.maximum(near, far), FAR)


def _sphere(o, d, r, yaw):
    o = o - np.array([0.0, r, 0.0], np.float32)
    t, _ = _quadratic(np.float32(1.0), (o * d).sum(1), (o * o).sum(1) - r * r)
    t = np.where(t > 0, t, FAR)
    return t, (o + t[:, None] * d) / r


def _cube(o, d, r, yaw):
    half = np.float32(0.80) * r  # looks as large as a sphere of radius r
    o = o - np.array([0.0, half, 0.0], np.float32)
    c, s = np.float32(np.cos(yaw)), np.float32(np.sin(yaw))
    turn = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]], np.float32)  # world -> cube
    o, d = o @ turn.T, d @ turn.T
    safe = np.where(np.abs(d) < 1e-9, np.float32(1e-9), d)
    first, second = (-half - o) / safe, (half - o) / safe
    enter, leave = np.minimum(first, second), np.maximum(first, second)
    axis = enter.argmax(1)
    t = np.take_along_axis(enter, axis[:, None], 1)[:, 0]
    t = np.where((t < leave.min(1)) & (t > 0), t, FAR)
    normal = np.zeros_like(d)
    np.put_along_axis(normal, axis[:, None], -np.sign(np.take_along_axis(d, axis[:, None], 1)), 1)
    return t, normal @ turn


def _cylinder(o, d, r, yaw):
    radius, height = np.float32(0.82) * r, np.float32(1.75) * r
    near, _ = _quadratic(d[:, 0] ** 2 + d[:, 2] ** 2, o[:, 0] * d[:, 0] + o[:, 2] * d[:, 2],
                         o[:, 0] ** 2 + o[:, 2] ** 2 - radius**2)  # fmt: skip
    y = o[:, 1] + near * d[:, 1]
    side = np.where((near > 0) & (near < FAR) & (y >= 0) & (y <= height), near, FAR)
    cap = _disc(o, d, height, radius)
    t = np.minimum(side, cap)
    hit = o + t[:, None] * d
    normal = np.where((cap < side)[:, None], np.array([0, 1, 0], np.float32), hit / radius * [1, 0, 1])
    return t, normal.astype(np.float32)


def _cone(o, d, r, yaw):
    radius, height = np.float32(0.95) * r, np.float32(2.0) * r
    slope = radius / height
    gap = height - o[:, 1]  # below the tip
    a = d[:, 0] ** 2 + d[:, 2] ** 2 - (slope * d[:, 1]) ** 2
    half_b = o[:, 0] * d[:, 0] + o[:, 2] * d[:, 2] + slope**2 * gap * d[:, 1]
    roots = _quadratic(a, half_b, o[:, 0] ** 2 + o[:, 2] ** 2 - (slope * gap) ** 2)
    t = np.full(len(d), FAR, np.float32)
    for root in roots[::-1]:  # the nearer root overwrites the farther
        y = o[:, 1] + root * d[:, 1]
        t = np.where((root > 0) & (root < FAR) & (y >= 0) & (y <= height), root, t)
    t = np.minimum(t, _disc(o, d, np.float32(0.0), radius))  # the base matters for shadows only
    hit = o + t[:, None] * d
    away = np.maximum(np.hypot(hit[:, 0], hit[:, 2]), 1e-6)
    normal = np.stack([hit[:, 0] / away, np.broadcast_to(slope, away.shape), hit[:, 2] / away], 1)
    return t, (normal / np.sqrt(1 + slope**2)).astype(np.float32)


def _disc(o, d, height, radius):
    """Distance to a horizontal disc at that height, FAR where it is missed."""
    t = (height - o[:, 1]) / np.where(np.abs(d[:, 1]) < 1e-9, np.float32(1e-9), d[:, 1])
    inside = (o[:, 0] + t * d[:, 0]) ** 2 + (o[:, 2] + t * d[:, 2]) ** 2 <= radius**2
    return np.where((t > 0) & inside, t, FAR).astype(np.float32)


_SHAPES = {"sphere": _sphere, "cube": _cube, "cylinder": _cylinder, "cone": _cone}


def _srgb(light):
    """Linear light -> sRGB in [0, 1], highlights rolled off."""
    light = np.clip(light, 0.0, None)
    light = np.where(light < 0.8, light, 0.8 + 0.2 * (1 - np.exp(-(light - 0.8) / 0.2)))
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055).clip(0, 1)
