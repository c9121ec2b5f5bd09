"""Zarr folders as other programs write them, and plans to predict them with."""

import copy

import numpy as np
import zarr
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from zarr.storage import LocalStore

RESAMPLING = {
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
}


def write_array(path, values, *, zarr_format=3, chunks=None, shards=None, names=None, **arguments):
    """An array of its own; returns its path."""
    chunks = chunks or tuple(max(1, min(n, 8)) for n in values.shape)
    array = zarr.create_array(
        LocalStore(path),
        shape=values.shape,
        dtype=values.dtype,
        chunks=chunks,
        shards=shards,
        zarr_format=zarr_format,
        dimension_names=names if zarr_format == 3 else None,
        attributes={"_ARRAY_DIMENSIONS": list(names)} if names and zarr_format == 2 else None,
        **arguments,
    )
    array[...] = values
    return path


def write_group(path, arrays, attributes, *, zarr_format=3):
    """A group of arrays by name; returns its path."""
    group = zarr.create_group(LocalStore(path), attributes=attributes, zarr_format=zarr_format)
    for name, values in arrays.items():
        chunks = tuple(min(n, 40) for n in values.shape)
        group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks)[...] = values
    return path


def ome(axes, scales, *, version="0.5", unit="micrometer", names=(), shared=None, translations=None):
    """Attributes of an OME-Zarr image: per level of ``scales`` its scale on ``axes``."""
    kinds = {"t": "time", "c": "channel"}
    described = [
        {"name": axis, "type": kinds.get(axis, "space")} | ({} if axis in kinds or not unit else {"unit": unit})
        for axis in axes
    ]
    datasets = []
    for i, scale in enumerate(scales):
        transformations = [{"type": "scale", "scale": list(scale)}] if scale else []
        if translations:
            transformations.append({"type": "translation", "translation": list(translations[i])})
        datasets.append({"path": f"s{i}", "coordinateTransformations": transformations})
    image = {"axes": described, "datasets": datasets}
    if shared:
        image["coordinateTransformations"] = [{"type": "scale", "scale": list(shared)}]
    if version == "0.4":
        image["version"] = version
    content = {"multiscales": [image]} | ({"omero": {"channels": [{"label": n} for n in names]}} if names else {})
    return content if version == "0.4" else {"ome": {"version": version, **content}}


def managers(
    schemes, *, spacing=(1.0, 1.0, 1.0), transpose=(0, 1, 2), masks=None, properties=None, reader="SimpleITKIO"
):
    """(plans manager, configuration manager) of plans with these normalizations, one per channel."""
    configuration = {
        "preprocessor_name": "DefaultPreprocessor",
        "normalization_schemes": list(schemes),
        "use_mask_for_norm": list(masks or [False] * len(schemes)),
        "spacing": list(spacing),
        "architecture": {},
        **copy.deepcopy(RESAMPLING),
    }
    given = properties or [{"mean": 0.5, "std": 1.5, "percentile_00_5": -1.0, "percentile_99_5": 2.0}] * len(schemes)
    plans = PlansManager(
        {
            "transpose_forward": list(transpose),
            "transpose_backward": list(np.argsort(transpose)),
            "image_reader_writer": reader,
            "foreground_intensity_properties_per_channel": {str(i): p for i, p in enumerate(given)},
            "configurations": {"c": configuration},
        }
    )
    return plans, plans.get_configuration("c")
