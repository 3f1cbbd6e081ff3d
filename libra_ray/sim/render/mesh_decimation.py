"""A render-only copy of a MuJoCo model whose robot has fewer triangles; physics and task objects stay as they are.

At 64 x 64 pixels on one core nine tenths of the time of a picture goes into the vertices of the Sawyer arm (66,539 triangles).
"""

import copy
import functools
from dataclasses import dataclass

import fast_simplification
import mujoco
import numpy as np
from numpy.typing import NDArray

MIN_FACES = 1000
"""Meshes with fewer triangles cost nothing and stay whole."""
AGGRESSIVENESS = 3
"""`fast_simplification`'s trade of speed against shape: its default of 7 tears the arm at this share, 3 keeps its outline."""


@dataclass(frozen=True, kw_only=True)
class _Mesh:
    """Vertices and their unit normals `(V, 3)` float32, triangles `(F, 3)` int32."""

    vertices: NDArray[np.float32]
    normals: NDArray[np.float32]
    faces: NDArray[np.int32]


def lighter_copy(model: mujoco.MjModel, robot_body: str, share: float) -> mujoco.MjModel:
    """A copy of `model` to build a rendering context from, never to step.

    Args:
        model: stays untouched.
        robot_body: any body of the robot; only meshes of its kinematic tree, and of nothing else, are simplified.
        share: of the triangles of each such mesh to keep, in (0, 1].
    """
    lighter = copy.copy(model)
    for mesh in _robot_meshes(model, robot_body):
        if model.mesh_facenum[mesh] >= MIN_FACES and model.mesh_texcoordadr[mesh] < 0:
            _replace(lighter, mesh, share)
    return lighter


def _robot_meshes(model: mujoco.MjModel, robot_body: str) -> set[int]:
    root = model.body_rootid[model.body(robot_body).id]
    is_mesh = model.geom_type == mujoco.mjtGeom.mjGEOM_MESH
    on_robot = model.body_rootid[model.geom_bodyid] == root
    return set(model.geom_dataid[is_mesh & on_robot].tolist()) - set(model.geom_dataid[is_mesh & ~on_robot].tolist())


def _replace(model: mujoco.MjModel, mesh: int, share: float) -> None:
    """Write the simplified mesh over the front of the whole one's slots; MuJoCo draws the first `mesh_facenum` triangles."""
    faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
    vertices = slice(model.mesh_vertadr[mesh], model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh])
    lighter = _simplified(model.mesh_vert[vertices].tobytes(), model.mesh_face[faces].tobytes(), share)
    if len(lighter.vertices) > min(model.mesh_vertnum[mesh], model.mesh_normalnum[mesh]):
        return
    first_vertex, first_normal, first_face = vertices.start, model.mesh_normaladr[mesh], faces.start
    model.mesh_vert[first_vertex : first_vertex + len(lighter.vertices)] = lighter.vertices
    model.mesh_normal[first_normal : first_normal + len(lighter.normals)] = lighter.normals
    model.mesh_face[first_face : first_face + len(lighter.faces)] = lighter.faces
    model.mesh_facenormal[first_face : first_face + len(lighter.faces)] = lighter.faces
    model.mesh_facenum[mesh] = len(lighter.faces)


@functools.lru_cache(maxsize=64)
def _simplified(vertex_bytes: bytes, face_bytes: bytes, share: float) -> _Mesh:
    """One mesh with about `share` of its triangles; all Meta-World tasks share one arm, so a process does it once."""
    points = np.frombuffer(vertex_bytes, np.float32).reshape(-1, 3)
    corners = np.frombuffer(face_bytes, np.int32).reshape(-1, 3)
    # MuJoCo doubles vertices at sharp edges; unmerged, the surface would tear along them.
    merged, index = np.unique(points, axis=0, return_inverse=True)
    vertices, faces = fast_simplification.simplify(
        merged, index.reshape(-1)[corners].astype(np.int32), target_count=int(len(corners) * share), agg=AGGRESSIVENESS
    )
    return _Mesh(vertices=vertices, normals=_vertex_normals(vertices, faces), faces=faces)


def _vertex_normals(vertices: NDArray[np.float32], faces: NDArray[np.int32]) -> NDArray[np.float32]:
    """Unit normals `(V, 3)`: the mean of the adjacent triangles' normals, weighted by their areas."""
    triangles = vertices[faces]
    weighted = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    normals = np.zeros_like(vertices)
    for corner in range(3):
        np.add.at(normals, faces[:, corner], weighted)
    length: NDArray[np.float32] = np.linalg.norm(normals, axis=1, keepdims=True)
    return normals / np.maximum(length, np.finfo(np.float32).tiny)
