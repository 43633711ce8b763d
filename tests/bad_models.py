"""Models each of which fails at another step of its way, for ``test_bad_models``; as functions, as users write them."""

import os
import sys

from conftest import command_of

NO_FILE = "/no/such/vocabulary"


def is_in(actor: str) -> bool:
    return command_of(os.getpid()).startswith(f"ray::{actor}")


def well(tf):
    x, w = tf.placeholder(tf.float32, [None], name="x"), tf.get_variable("w", initializer=[2.0])
    return {"serving_default": ({"x": x}, {"y": x * w})}


def raises(tf):
    raise RuntimeError("it is broken\nin two lines")


def leaves(tf):
    sys.exit("it leaves")


def stops(tf):
    return next(iter([]))


def is_none(tf):
    return None


def fails_as_tensorflow(tf):
    raise tf.errors.InternalError(None, None, "an internal error")


def without_kernel(tf):
    x, w = tf.placeholder(tf.float32, [None], name="x"), tf.get_variable("w", initializer=[1.0])
    return {
        "serving_default": (
            {"x": x},
            {"y": tf.raw_ops.BoostedTreesBucketize(float_values=[x], bucket_boundaries=[w])[0]},
        )
    }


def without_file(tf):
    x, kind = tf.placeholder(tf.string, [None], name="x"), tf.lookup.TextFileIndex
    entries = tf.lookup.TextFileInitializer(NO_FILE, tf.string, kind.WHOLE_LINE, tf.int64, kind.LINE_NUMBER)
    return {"serving_default": ({"x": x}, {"y": tf.lookup.StaticHashTable(entries, -1).lookup(x)})}


def without_initializer(tf):
    x = tf.placeholder(tf.float32, [None], name="x")
    return {"serving_default": ({"x": x}, {"y": x * tf.get_variable("w", [], collections=[])})}


damaged_weights = other_weights = well


def with_operations(tf):
    """Of a library that TensorFlow does not load by itself."""
    folder = os.path.join(tf.sysconfig.get_lib(), "lite/experimental/microfrontend/python/ops")
    operations = tf.load_op_library(os.path.join(folder, "_audio_microfrontend_op.so"))
    x = tf.placeholder(tf.int16, [None], name="x")
    return {"serving_default": ({"x": x}, {"y": operations.audio_microfrontend(x)})}


def fails_in_workers(tf):
    """They call it as well, for its operations."""
    if is_in("Worker"):
        raise RuntimeError("not in a worker")
    return with_operations(tf)


def never_ready_to_run(tf):
    """Each run fails, those on trial and for warming up as well."""
    x = tf.placeholder(tf.float32, [None], name="x")
    with tf.control_dependencies([tf.debugging.Assert(False, ["never"])]):
        return {"serving_default": ({"x": x}, {"y": tf.identity(x)})}


def ends_once(tf):
    """It ends the process that builds it first."""
    try:
        os.close(os.open(os.environ["BAD_MODELS_FILE"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return well(tf)
    os._exit(7)


def ends_always(tf):
    os._exit(7)


def ends_workers(tf):
    if is_in("Worker"):
        os._exit(7)
    return with_operations(tf)


REASONS = {  # why they are not served
    "raises": "RuntimeError: it is broken",
    "leaves": "SystemExit it leaves",
    "stops": "StopIteration",
    "is_none": "is_none returned None, not a dict of signatures",
    "fails_as_tensorflow": "InternalError: an internal error",
    "without_kernel": "No OpKernel was registered to support Op 'BoostedTreesBucketize'",
    "without_file": f"{NO_FILE}; No such file or directory",
    "without_initializer": "nothing initializes 'w', which an output needs",
    "damaged_weights": "is damaged or gone",
    "other_weights": "is not of this model: there is no variable 'v'",
    "fails_in_workers": "not in a worker",
}
