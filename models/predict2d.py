"""Run a model on a 2D image: one embedding.

E embedding, R rows and C columns of the image, S of the network's square.
"""

from __future__ import annotations

from models.bundle import image_input
from models.predict import Clock, Embedding, on_the_sphere, require_kind
from models.preprocess2d import Float32Array, as_channels, prepare_image
from models.session import OnnxSession


def embed_image(session: OnnxSession, pixels: Float32Array) -> Embedding:
    """One unit vector for an image: the network's, of the whole image as one square.

    Args:
        session: An open encoder.
        pixels: The image (R, C), not all equal.

    Raises:
        BundleError: `wrong_model_kind`, `degenerate_embedding` (a zero vector), or what
            `OnnxSession.run` raises.
    """
    require_kind(session.manifest, "encoder")
    spec = image_input(session.manifest)
    clock = Clock()
    with clock.stage("preprocess"):
        square = prepare_image(pixels, spec)  # (S, S)
        batch = as_channels(square, spec.normalisation)[None]  # (1, 3, S, S)
    with clock.stage("infer"):
        gives_back = not session.may_keep_memory(batch.size)
        (embedding,) = session.run(batch, release_memory=gives_back)  # (E,)
    vector, distance = on_the_sphere(embedding, session)
    return Embedding(vector, 1, clock.timings_s(), distance)
