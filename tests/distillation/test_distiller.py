"""The distiller as a Keras model: what it trains, what it leaves alone, where it runs."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import CONTEXT, make_gpt, random_batch, two_replicas
from decoder.families import make
from distillation.test_losses import expected, ragged
from tfgptopt.callbacks import Pruning, QuantizationAwareTraining

import tfgptopt
from tfgptopt.distillation import AttentionMaps, Distiller, HardLabels, HiddenStates, LogitsKL
from tfgptopt.distillation.technique import Distill
from tfgptopt.pruning import ConstantSparsity
from tfgptopt.quantization import Int8
from tfgptopt.quantization.layers import is_dressed


def compiled(student, teacher, losses=None, rate=1e-2, **settings):
    distiller = Distiller(student, teacher, losses)
    distiller.compile(optimizer=keras.optimizers.SGD(rate), **settings)
    return distiller


def loss(distiller, *given):
    return distiller.evaluate(*given, verbose=0, return_dict=True)["loss"]


def data(rows=8, repeats=1):
    return tf.data.Dataset.from_tensor_slices(random_batch(rows)).batch(4).repeat(repeats)


def test_training_brings_the_student_to_the_teacher():
    student, teacher = make_gpt(layers=1), make_gpt(layers=1)
    student.set_weights([w + 0.05 * np.random.normal(size=w.shape) for w in student.get_weights()])
    distiller = Distiller(student, teacher)
    distiller.compile(optimizer=keras.optimizers.Adam(3e-3))
    history = distiller.fit(data(), epochs=12, verbose=0).history["loss"]
    assert history[-1] < 0.2 * history[0]


def test_pruning_and_rounding_dress_the_student_alone():
    student, teacher = make_gpt(layers=1), make_gpt(layers=1)
    before = teacher.get_weights()
    distiller = compiled(student, teacher, [LogitsKL(), HiddenStates({0: 0})])
    callbacks = [
        Pruning(ConstantSparsity(0.5, begin_step=0, frequency=1)),
        QuantizationAwareTraining(Int8()),
    ]
    distiller.fit(data(), verbose=0, callbacks=callbacks)
    assert distiller.student is student
    assert not any(is_dressed(layer) for layer in teacher._flatten_layers())
    for old, new in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert any(is_dressed(layer) for layer in student._flatten_layers())
    tfgptopt.finalize(student)
    kernel = student.backbone.transformer_layers[0]._feedforward_output_dense.kernel
    assert np.mean(np.asarray(kernel) == 0) >= 0.5


def test_undressing_the_student_is_noticed():
    student = make_gpt(layers=1)
    distiller = compiled(student, make_gpt(layers=1))
    tfgptopt.quantize_aware(student, Int8())
    distiller.evaluate(data(), verbose=0)
    tfgptopt.finalize(student)
    inputs, labels = random_batch()
    found = loss(distiller, inputs, labels)
    p, q = np.asarray(distiller.teacher.model(inputs)), np.asarray(student(inputs))
    assert found == pytest.approx(expected(p, q, 1.0, "forward").mean(), rel=1e-4)


def test_self_is_the_dense_model_before_compression():
    student = make_gpt(layers=1)
    inputs, _ = random_batch()
    before = np.asarray(student(inputs))
    distiller = compiled(student, "self")
    assert loss(distiller, data()) == pytest.approx(0.0, abs=1e-9)
    tfgptopt.prune(student, 0.5)
    assert loss(distiller, data()) > 1e-6
    np.testing.assert_allclose(distiller.teacher.model(inputs), before, atol=1e-6)
    with pytest.raises(ValueError, match="compressed model"):
        Distiller(student, "self")


def test_a_tied_llama_teaches_itself():
    student = make("Llama3")
    assert loss(compiled(student, "self"), *ragged()[:2]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", ["keras int8", "rounded", "another family", "dropout"])
def test_teachers_of_any_kind(kind):
    student = make("GPT2", dropout=0.0)
    if kind == "another family":
        teacher = make("Llama3")
    else:
        teacher = make("GPT2", dropout=0.5) if kind == "dropout" else make("GPT2")
        teacher.set_weights([1.1 * w for w in teacher.get_weights()])
    if kind == "keras int8":
        teacher.quantize("int8")
    if kind == "rounded":
        tfgptopt.quantize_aware(teacher, Int8())
    inputs, labels, _ = ragged()
    p, q = np.asarray(teacher(inputs)), np.asarray(student(inputs))
    # Rate 0: the loss of a training step is that of the untrained student.
    logs = compiled(student, teacher, rate=0.0).fit(inputs, labels, verbose=0).history
    mask = inputs["padding_mask"]
    wanted = (expected(p, q, 1.0, "forward") * mask).sum() / mask.sum()
    assert logs["loss"][0] == pytest.approx(wanted, rel=2e-3)


def test_weights_of_losses_follow_the_steps():
    ramp = keras.optimizers.schedules.PolynomialDecay(0.0, 4, end_learning_rate=1.0)
    losses = [LogitsKL(weight=ramp), HardLabels(weight=lambda step: 1.0 - step / 4)]
    student, teacher = make_gpt(layers=1), make_gpt(layers=1)
    student.set_weights([w + 0.05 for w in student.get_weights()])
    distiller = compiled(student, teacher, losses, rate=0.0)
    inputs, labels = random_batch()
    for step in range(4):
        logs = distiller.train_on_batch(inputs, labels, return_dict=True)
        distiller.reset_metrics()
        share = step / 4
        wanted = share * logs["logits_kl"] + (1 - share) * logs["hard_labels"]
        assert logs["loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_a_checkpoint_resumes_and_holds_no_teacher(tmp_path):
    def build(teacher_layers=1):
        student = make("GPT2", num_layers=1, hidden_dim=16, dropout=0.0)
        distiller = Distiller(student, make("GPT2", num_layers=teacher_layers), [HiddenStates()])
        distiller.compile(optimizer=keras.optimizers.Adam(1e-2))
        return distiller

    inputs, labels, _ = ragged()
    first = build()
    first.fit(inputs, labels, verbose=0)
    first.save_weights(tmp_path / "d.weights.h5")
    first.fit(inputs, labels, verbose=0)
    second = build()
    second.fit(inputs, labels, verbose=0)  # Makes the optimizer's variables.
    second.load_weights(tmp_path / "d.weights.h5")
    second.fit(inputs, labels, verbose=0)
    for a, b in zip(first.get_weights(), second.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    other = build(teacher_layers=2)
    other.fit(inputs, labels, verbose=0)
    other.save_weights(tmp_path / "o.weights.h5")
    sizes = {(tmp_path / f"{name}.weights.h5").stat().st_size for name in "do"}
    assert len(sizes) == 1
    with pytest.raises(NotImplementedError, match=r"distiller\.student"):
        first.get_config()


def test_two_replicas_take_the_step_of_one():
    """With rows of different lengths, so that replicas have different numbers of real tokens."""
    inputs, labels, weights = ragged()

    def step(strategy):
        with strategy.scope():
            student, teacher = make("GPT2", dropout=0.0), make("GPT2", num_layers=3)
            losses = [LogitsKL(2.0), HiddenStates({0: 0}), AttentionMaps({1: 2})]
            distiller = compiled(student, teacher, losses, rate=0.05)
            dataset = tf.data.Dataset.from_tensor_slices((inputs, labels, weights)).batch(4)
            logs = distiller.fit(dataset, verbose=0).history
        return logs["loss"][0], student.get_weights()

    one = step(tf.distribute.get_strategy())
    two = step(two_replicas())
    assert two[0] == pytest.approx(one[0], rel=1e-5)
    for a, b in zip(one[1], two[1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def step_of_all_losses(**settings):
    """Returns the loss and the weights behind four steps."""
    losses = [LogitsKL(2.0), HardLabels(), HiddenStates(), AttentionMaps()]
    student = make("GPT2", dropout=0.0)
    distiller = compiled(student, make("GPT2", num_layers=3), losses, 0.01, **settings)
    dataset = tf.data.Dataset.from_tensors(ragged()).repeat(4)
    return distiller.fit(dataset, verbose=0).history["loss"][0], student.get_weights()


@pytest.fixture(scope="module")
def step_as_usual():
    return step_of_all_losses()


@pytest.mark.parametrize(
    "settings",
    [{"jit_compile": True}, {"steps_per_execution": 2}, {"run_eagerly": True}],
    ids=["jit", "executions", "eager"],
)
def test_ways_to_run_give_the_same_step(settings, step_as_usual):
    loss, weights = step_of_all_losses(**settings)
    assert step_as_usual[0] == pytest.approx(loss, rel=1e-4)
    for a, b in zip(step_as_usual[1], weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        student, teacher = make_gpt(layers=1), make_gpt(layers=1)
    finally:
        keras.config.set_dtype_policy("float32")
    distiller = Distiller(student, teacher, [LogitsKL(), HiddenStates(), AttentionMaps()])
    distiller.compile(optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-3)))
    logs = distiller.fit(data(repeats=2), verbose=0).history
    assert np.isfinite(logs["loss"][0])
    assert student.trainable_variables[0].dtype == "float32"


def test_metrics_of_compile_see_real_tokens_alone():
    student = make("GPT2")
    inputs, labels, _ = ragged()
    distiller = compiled(student, make("GPT2"), weighted_metrics=["sparse_categorical_accuracy"])
    logs = distiller.evaluate(inputs, labels, verbose=0, return_dict=True)
    mask = inputs["padding_mask"]
    right = (np.asarray(student(inputs)).argmax(-1) == labels) * mask
    assert logs["sparse_categorical_accuracy"] == pytest.approx(right.sum() / mask.sum())


def test_text_is_read_as_a_causal_lm_reads_it(corpus):
    import keras_hub

    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        corpus.tokenizer, sequence_length=CONTEXT
    )
    size = corpus.tokenizer.vocabulary_size()
    student, teacher = (
        make_gpt(size, preprocessor, layers=1),
        make_gpt(size, preprocessor, layers=1),
    )
    distiller = compiled(student, teacher, [HardLabels()])
    texts = ["def main(argv):\n", "import os\n", "return self.scan_once(s, idx)\n"]
    batches = tf.data.Dataset.from_tensor_slices(texts).batch(3)
    student.compile(optimizer="sgd", weighted_metrics=[])
    wanted = student.evaluate(batches, verbose=0)
    total = preprocessor(texts)[2].numpy().sum() / preprocessor(texts)[2].numpy().size
    for given in (texts, batches, np.asarray(texts)):
        # Keras divides by all tokens, the distiller by the real ones.
        assert loss(distiller, given) * total == pytest.approx(wanted, rel=1e-4)
    assert student.preprocessor is preprocessor
    logits = distiller.predict(texts, verbose=0)
    np.testing.assert_allclose(logits, student(preprocessor(texts)[0]), atol=1e-5)
    distiller.fit(texts, batch_size=2, verbose=0, validation_data=texts)
    with pytest.raises(ValueError, match="no preprocessor"):
        compiled(make_gpt(layers=1), make_gpt(layers=1)).fit(texts, verbose=0)


BAD = {
    "number of logits": (lambda s: Distiller(s, make("GPT2")), "211 tokens, and the student"),
    "no model": (lambda s: Distiller(s, "teacher.keras"), "'self'"),
    "no student": (lambda s: Distiller("gpt", s), "student must be a Keras"),
    "itself": (lambda s: Distiller(s, s), "share weights"),
    "no loss": (lambda s: Distiller(s, "self", []), "non-empty list"),
    "a class": (lambda s: Distiller(s, "self", [LogitsKL]), "A loss is"),
    "temperature": (lambda s: LogitsKL(0.0), "above 0"),
    "temperature below": (lambda s: LogitsKL(-1), "above 0"),
    "direction": (lambda s: LogitsKL(direction="both"), "forward, reverse"),
    "weight": (lambda s: HardLabels(-0.1), ">= 0"),
    "distance": (lambda s: HiddenStates(distance="l1"), "'mse' or 'cosine'"),
    "layers": (lambda s: HiddenStates({}), "non-empty mapping"),
    "no such layer": (lambda s: Distiller(s, "self", [HiddenStates({5: 0})]), "2 decoder layers"),
    "no such name": (lambda s: Distiller(s, "self", [HiddenStates({"x": 0})]), "0 layers named"),
    "compile": (lambda s: Distiller(s, "self").compile(loss="mse"), "when it is made"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, gpt):
    make_wrong, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make_wrong(gpt)


def test_widths_that_differ_need_a_projection():
    student, teacher = make("GPT2", hidden_dim=16), make("GPT2")
    with pytest.raises(ValueError, match=r"16 features .* 32: without a projection"):
        Distiller(student, teacher, [HiddenStates(projection=False)])


def test_tokenizers_must_agree(corpus):
    import keras_hub

    vocabulary = corpus.tokenizer.vocabulary
    swapped = dict(zip(vocabulary, [1, 0, *range(2, len(vocabulary))], strict=True))
    other = keras_hub.models.GPT2Tokenizer(vocabulary=swapped, merges=corpus.tokenizer.merges)
    models = [
        make_gpt(len(vocabulary), keras_hub.models.GPT2CausalLMPreprocessor(tokenizer))
        for tokenizer in (corpus.tokenizer, other)
    ]
    with pytest.raises(ValueError, match="different tokenizers"):
        Distiller(*models)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_labels_of_padding_may_be_anything(jit_compile):
    inputs, labels = random_batch()
    inputs["padding_mask"][:, 10:] = 0
    ignored = np.where(inputs["padding_mask"] > 0, labels, np.int32(-100))
    student = make_gpt(layers=1)
    losses = [LogitsKL(), HardLabels()]
    distiller = compiled(student, make_gpt(layers=1), losses, jit_compile=jit_compile)
    found, before = [], student.get_weights()
    for given in (labels, ignored):
        student.set_weights(before)
        distiller.fit(inputs, given, epochs=2, verbose=0)
        found.append(student.get_weights())
    for clean, other in zip(*found, strict=True):
        np.testing.assert_array_equal(clean, other)


def test_a_file_is_not_touched_by_saving_as_a_whole(tmp_path):
    student = make_gpt(layers=1)
    distiller = compiled(student, make_gpt(layers=1))
    path = tmp_path / "good.keras"
    student.save(path)
    before = path.read_bytes()
    with pytest.raises(NotImplementedError, match=r"Save `distiller\.student`"):
        distiller.save(path)
    checkpoint = keras.callbacks.ModelCheckpoint(path)
    for given in (checkpoint, [checkpoint], keras.callbacks.CallbackList([checkpoint])):
        with pytest.raises(ValueError, match="save_weights_only=True"):
            distiller.fit(data(), verbose=0, callbacks=given)
    distiller.fit(data(), verbose=0, callbacks=keras.callbacks.TerminateOnNaN())
    assert path.read_bytes() == before


def test_the_student_remembers_what_it_was_taught():
    student = make_gpt(layers=1)
    distiller = compiled(student, make_gpt(layers=1), [LogitsKL(2.0), HardLabels(lambda step: 1.0)])
    assert Distill.found_on(student) == []
    for _ in range(2):
        distiller.fit(data(), epochs=1, verbose=0)
    (found,) = Distill.found_on(student)
    # A function cannot be written down.
    assert found == Distill(None, (LogitsKL(2.0),))
    config = found.to_config()
    assert config.pop("name") == "distill" and Distill.from_config(config) == found
