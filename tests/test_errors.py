"""What is told of a failure."""

import pickle

import pytest

from shared_graph import errors

NODE = "init/InitializeTable"
NO_KERNEL = "No OpKernel was registered to support Op 'A' used by b/c"
TRACED = """Graph execution error:

Detected at node 'dense/MatMul' defined at (most recent call last):
  File "train.py", line 3, in <module>
    model = build()
Node: 'dense/MatMul'
Matrix size-incompatible: In[0]: [1,3], In[1]: [4,5]
\t [[{{node dense/MatMul}}]]

Original stack trace for 'dense/MatMul':
  File "train.py", line 3, in <module>
"""


@pytest.mark.parametrize(
    ["message", "sentence"],
    [
        ("one\ntwo", "one"),
        ("", "RuntimeError"),
        ("File system scheme 'gs' not implemented (file: 'gs://a')",) * 2,
        (TRACED, "Matrix size-incompatible: In[0]: [1,3], In[1]: [4,5]"),
        (
            f"Detected at node '{NODE}' defined at (most recent call last):\nNode: '{NODE}'\n/words; No such",
            "/words; No such",
        ),
        ("From /job:ps/replica:0/task:0:\nassertion failed: [x]\n\t [[{{node Assert}}]]", "assertion failed: [x]"),
        (
            "\n========\nINVALID_ARGUMENT: From /job:ps/replica:0/task:1:\nindices[0] = -1 is not in [0, 5)",
            "indices[0] = -1 is not in [0, 5)",
        ),
        ("2 root error(s) found.\n  (0) NOT_FOUND: /words\n\t [[{{node a}}]]\n  (1) CANCELLED: b", "/words"),
        ("{{function_node __inference_f_3}} {{function_node __inference_g_4}} no [[{{node a}}]]", "no"),
        ("No OpKernel was registered to support Op 'A' used by {{node b/c}}", NO_KERNEL),
    ],
)
def test_of_what_tensorflow_tells_the_sentence_that_matters_is_told(message, sentence):
    assert errors.first_sentence(RuntimeError(message)) == sentence


def test_whatever_fails_in_an_actor_arrives_as_an_error_of_ours_made_of_text():
    class Foreign(Exception):
        """Which nobody else can import."""

    with (
        pytest.raises(errors.Error, match=r"^It cannot start: Foreign: why$") as caught,
        errors.as_own_errors("It cannot start"),
    ):
        raise Foreign("why\nand more")
    assert type(caught.value) is errors.Error
    for kind in (errors.ModelError, errors.ActorUnavailable, errors.WorkerLost):
        copy = pickle.loads(pickle.dumps(kind("why", 418)))
        assert (type(copy), str(copy), copy.status) == (kind, "why", 418)


def test_of_a_message_with_bytes_that_are_no_utf_8_all_else_is_told():
    with pytest.raises(UnicodeDecodeError) as caught:
        b"Could not parse: '\xff'".decode()
    assert errors.first_sentence(caught.value) == "Could not parse: '\ufffd'"
