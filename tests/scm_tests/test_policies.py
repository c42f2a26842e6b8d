"""Gradient policies: which one is in force, what it does, and that it acts on (P, Q)."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import threading
import weakref

import numpy as np
import pytest
import torch

from scm.autodiff import policies
from scm.autodiff.policies import (
    POLICY_CODES,
    POLICY_REGISTRY,
    GradientPolicy,
    GradientPolicyConfig,
    apply_policy,
    apply_policy_tensor,
    apply_policy_vector,
    gate_denominator,
    gate_gradients,
    gate_tuple,
    get_policy,
    gradient_policy,
    has_active_policy,
    policies_disabled,
    policy_registry_snapshot,
    register_policy,
    restore_policy_registry,
    scaled_gradients,
)
from scm.layers.normalization import SCMNorm
from scm.layers.scm_rational import SCMRationalLayer
from scm.losses.coverage import rejection_loss
from scm.losses.projective import projective_fit_loss
from scm.losses.training import LossConfig, SCMTrainingLoss
from scm.training.targets import lift_semantic_targets

REGISTERED = dict(POLICY_REGISTRY)  # before any test registers or restores
ALL = list(GradientPolicy)


@pytest.fixture(autouse=True)
def _own_registry():
    before = policy_registry_snapshot()
    yield
    restore_policy_registry(before)


# --- recorded cases -------------------------------------------------------------------------------


def test_resolution_matches_the_recorded_cases(vector_group):
    """Context, registered default and CLAMP come in the recorded order."""
    register_policy("my_layer", GradientPolicy.REJECT)
    errors = {"ValueError": ValueError, "TypeError": TypeError}
    for case in vector_group("gradient_policy_resolution"):
        expected = case["expected"]
        if isinstance(expected, dict):
            with pytest.raises(errors[expected["raises"]]):
                get_policy(case["layer"])
        elif case["context"] is None:
            assert get_policy(case["layer"]).value == expected, case["id"]
        else:
            with gradient_policy(GradientPolicy(case["context"])):
                assert get_policy(case["layer"]).value == expected, case["id"]


def test_scalars_match_the_recorded_cases(vector_group, decode_numbers):
    """Every recorded number becomes the recorded one; a clamped nan stays nan."""
    for case in vector_group("gradient_policy_scalar"):
        gradients, expected = decode_numbers(case["gradients"]), decode_numbers(case["expected"])
        if case.get("quirk"):
            expected = [math.nan if math.isnan(g) else e for g, e in zip(gradients, expected, strict=True)]
        got = apply_policy_vector(gradients, case["is_bottom"], GradientPolicy(case["policy"]))
        np.testing.assert_array_equal(got, expected, err_msg=case["id"])


def test_tensors_match_the_recorded_cases(vector_group, decode_numbers):
    """The tensor form gives the recorded numbers, with the policy as a word or as a code per element."""
    for case in vector_group("gradient_policy_tensor"):
        gradients = torch.tensor(decode_numbers(case["gradients"]), dtype=torch.float64)
        policy, bottom = GradientPolicy(case["policy"]), torch.tensor(case["bottom_mask"])
        codes = torch.full(gradients.shape, POLICY_CODES[policy])
        for form in (policy, codes, codes[0]):
            got = apply_policy_tensor(gradients, bottom, form)
            np.testing.assert_array_equal(got, decode_numbers(case["expected"]), err_msg=case["id"])


def test_a_clamped_nan_is_a_nan():
    """CLAMP must not turn a broken gradient into a step of +1."""
    assert math.isnan(apply_policy(math.nan, False, GradientPolicy.CLAMP))
    assert apply_policy(3 - 4j, False, GradientPolicy.CLAMP) == 3 - 4j
    assert apply_policy(3 - 4j, True, GradientPolicy.CLAMP) == 0


def test_the_policy_of_a_number_comes_from_the_context():
    """Without an argument the context decides, and outside of it CLAMP."""
    assert apply_policy(5.0, False) == 1.0
    with gradient_policy(GradientPolicy.PASSTHROUGH):
        assert apply_policy(5.0, True) == 5.0


# --- contexts and registry ------------------------------------------------------------------------


def _raise_inside(policy):
    with gradient_policy(policy):
        raise RuntimeError(f"in force: {get_policy().value}")


def test_contexts_nest_and_survive_exceptions():
    """Leaving a block, normally or not, restores what was in force before."""
    with gradient_policy(GradientPolicy.PROJECT):
        with pytest.raises(RuntimeError, match="in force: reject"):
            _raise_inside(GradientPolicy.REJECT)
        assert get_policy() is GradientPolicy.PROJECT
        with policies_disabled():
            assert not has_active_policy()
            assert get_policy("scm_rational") is GradientPolicy.PROJECT  # the layer's own
            with gradient_policy(GradientPolicy.PASSTHROUGH):
                assert get_policy() is GradientPolicy.PASSTHROUGH
        assert has_active_policy()
    assert not has_active_policy()


def test_contexts_are_absent_in_new_threads():
    """A thread that is started inside of a block starts without a policy."""
    seen = []
    with gradient_policy(GradientPolicy.REJECT):
        thread = threading.Thread(target=lambda: seen.append((get_policy(), has_active_policy())))
        thread.start()
        thread.join()
    assert seen == [(GradientPolicy.CLAMP, False)]


def test_contexts_are_copied_into_asyncio_children():
    """A task has the policy in force at its creation, and its own blocks reach no other task."""

    async def child(own: GradientPolicy | None, entered: asyncio.Event, other: asyncio.Event) -> list:
        seen = [get_policy()]
        if own is None:
            await other.wait()
            seen.append(get_policy())
            entered.set()
        else:
            with gradient_policy(own):
                entered.set()
                await other.wait()
                seen.append(get_policy())
        return seen

    async def main() -> list:
        a, b = asyncio.Event(), asyncio.Event()
        with gradient_policy(GradientPolicy.PROJECT):
            tasks = [
                asyncio.create_task(child(GradientPolicy.REJECT, a, b)),
                asyncio.create_task(child(None, b, a)),
            ]
        return await asyncio.gather(*tasks)

    project, reject = GradientPolicy.PROJECT, GradientPolicy.REJECT
    assert asyncio.run(main()) == [[project, reject], [project, project]]


def test_registry_is_read_only_and_restores_whole():
    """Defaults change by registration alone; a bad snapshot changes nothing."""
    with pytest.raises(TypeError):
        POLICY_REGISTRY["x"] = GradientPolicy.CLAMP  # type: ignore[index]
    before = policy_registry_snapshot()
    register_policy(" My_Layer ", GradientPolicy.REJECT)
    assert POLICY_REGISTRY["my_layer"] is GradientPolicy.REJECT
    assert "my_layer" not in before
    with pytest.raises(TypeError, match="policy must be a GradientPolicy"):
        restore_policy_registry({"a": GradientPolicy.CLAMP, "b": "clamp"})  # type: ignore[dict-item]
    assert POLICY_REGISTRY["my_layer"] is GradientPolicy.REJECT
    restore_policy_registry(before)
    assert dict(POLICY_REGISTRY) == dict(before)


def test_layers_have_their_own_defaults():
    """The rational layer projects, the others clamp, and so does what is not registered."""
    assert {
        "scm_rational": GradientPolicy.PROJECT,
        "scm_norm": GradientPolicy.CLAMP,
        "scm_softmax": GradientPolicy.CLAMP,
        "coverage": GradientPolicy.CLAMP,
        "rejection_loss": GradientPolicy.CLAMP,
    } == REGISTERED
    assert get_policy("no_such_layer") is GradientPolicy.CLAMP


def test_the_hard_coverage_has_a_default_of_its_own():
    """Registered as REJECT, it is 0 wherever neither an argument nor a context says otherwise."""
    before = policy_registry_snapshot()
    bottoms = torch.tensor([True, True, False, False])
    try:
        register_policy("rejection_loss", GradientPolicy.REJECT)
        assert rejection_loss(bottoms, 1.0).item() == 0
        assert rejection_loss(bottoms, 1.0, policy=GradientPolicy.CLAMP).item() == 0.25
        with gradient_policy(GradientPolicy.CLAMP):
            assert rejection_loss(bottoms, 1.0).item() == 0.25
    finally:
        restore_policy_registry(before)
    assert rejection_loss(bottoms, 1.0).item() == 0.25


def test_a_config_that_says_nothing_clamps():
    """Built without arguments, or read from an empty mapping."""
    assert GradientPolicyConfig().policy is GradientPolicyConfig.from_dict({}).policy is GradientPolicy.CLAMP


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_threshold_itself_is_no_bottom(dtype):
    """As in decoding: |Q| at tau is accepted and the next number below it is not; a tau of 0 is one."""
    tau = torch.tensor(0.25, dtype=dtype)
    below = torch.nextafter(tau, torch.zeros_like(tau))
    Q = torch.stack([tau, -tau, below, -below, torch.zeros_like(tau)]).requires_grad_()
    for threshold, passes in ((0.25, [1, 1, 0, 0, 0]), (0.0, [1, 1, 1, 1, 1])):
        with gradient_policy(GradientPolicy.PROJECT, tau=threshold):
            gated = gate_denominator(Q)
        assert torch.autograd.grad(gated.sum(), Q)[0].tolist() == passes


def test_numbers_stay_what_they_are():
    """A rejected complex number is a complex zero and a rejected float a float one."""
    for gradient in (2.5, 2.5 - 1j):
        rejected = apply_policy(gradient, False, GradientPolicy.REJECT)
        assert rejected == 0
        assert type(rejected) is type(gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_scale_of_another_dtype_leaves_gradients_theirs(dtype):
    """A scale is kept in float32; what it clamps stays in its own dtype."""
    gradient = torch.tensor([3.0, -0.5, -30.0], dtype=dtype)
    limit = torch.tensor(2.0, dtype=torch.float64).reshape(1)
    clamped = apply_policy_tensor(gradient, gradient > 99, GradientPolicy.CLAMP, limit=limit)
    assert clamped.dtype == dtype
    assert clamped.tolist() == [2.0, -0.5, -2.0]


def test_policy_config_is_plain_data():
    """A policy survives the round trip through plain data."""
    for policy in ALL:
        config = GradientPolicyConfig(policy)
        assert config.to_dict() == {"policy": policy.value}
        assert GradientPolicyConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gradient_policy("clamp").__enter__(), TypeError, "must be a GradientPolicy"),
        (
            lambda: gradient_policy(GradientPolicy.CLAMP, tau=-1.0).__enter__(),
            ValueError,
            "tau must be finite",
        ),
        (
            lambda: gradient_policy(GradientPolicy.CLAMP, tau=math.nan).__enter__(),
            ValueError,
            "tau must be finite",
        ),
        (lambda: apply_policy(1.0, False, "clamp"), TypeError, "must be a GradientPolicy"),
        (lambda: register_policy("x", "clamp"), TypeError, "must be a GradientPolicy"),
        (lambda: register_policy("  ", GradientPolicy.CLAMP), ValueError, "layer must not be empty"),
        (lambda: register_policy(3, GradientPolicy.CLAMP), TypeError, "layer must be a str"),
        (lambda: GradientPolicyConfig.from_dict({"policy": "stop"}), ValueError, "policy must be one of"),
        (
            lambda: gate_gradients(torch.ones(1, requires_grad=True), torch.ones(1) > 0, "clamp"),
            TypeError,
            "must be a GradientPolicy",
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    """Each bad argument is refused by name and rule."""
    with pytest.raises(error, match=message):
        call()


# --- the action on (P, Q) -------------------------------------------------------------------------


def _batch():
    generator = torch.Generator().manual_seed(4)
    codes = torch.tensor([0, 0, 2, 3, 1, 0, 0, 3])
    targets = lift_semantic_targets(torch.randn(8, generator=generator), codes)
    P = torch.randn(8, generator=generator, requires_grad=True)
    Q = torch.tensor([0.5, 1e-3, 2e-3, -0.4, 1e-3, -2e-3, 1.0, 0.1], requires_grad=True)
    return P, Q, targets


TAU = 1e-2
BOTTOM = torch.tensor([False, True, True, False, True, True, False, False])


def _loss(P, Q, targets, coverage_weight=0.0, scale=100.0):
    """Fit, margin and sign, large enough for CLAMP to clamp; and the soft coverage where weighted."""
    lifted = (targets.Y_n, targets.Y_d)
    config = LossConfig(coverage_term="soft", tau_train=TAU, lambda_margin=1e4, lambda_rej=coverage_weight)
    fit = projective_fit_loss(P, Q, *lifted, mask=targets.mask_trained) * scale
    total, _ = SCMTrainingLoss(config)(
        fit,
        P,
        Q,
        *lifted,
        mask_finite=targets.mask_finite,
        mask_singular=targets.mask_oriented,
        weights={"sign": scale},
    )
    return total


def _gradients(policy, around, **keywords):
    P, Q, targets = _batch()
    if policy is None:
        _loss(P, Q, targets, **keywords).backward()
    elif around == "forward":
        with gradient_policy(policy, tau=TAU):
            loss = _loss(P, Q, targets, **keywords)
        loss.backward()
    elif around == "both":
        with gradient_policy(policy, tau=TAU):
            _loss(P, Q, targets, **keywords).backward()
    else:
        loss = _loss(P, Q, targets, **keywords)
        with gradient_policy(policy, tau=TAU):
            loss.backward()
    return torch.stack((P.grad, Q.grad))


@pytest.mark.parametrize("around", ["forward", "backward", "both"])
def test_four_policies_give_four_gradients(around):
    """Where bottoms occur, the policies differ from each other as their table says."""
    free = _gradients(None, around)
    got = {policy: _gradients(policy, around) for policy in ALL}
    assert bool((free.abs() > 1).any())
    assert bool((free[:, BOTTOM] != 0).any())
    torch.testing.assert_close(got[GradientPolicy.PASSTHROUGH], free)
    torch.testing.assert_close(got[GradientPolicy.PROJECT], torch.where(BOTTOM, 0.0, free))
    assert bool((got[GradientPolicy.REJECT] == 0).all())
    clamped = got[GradientPolicy.CLAMP]
    assert bool((clamped[:, BOTTOM] == 0).all())
    assert bool((clamped[:, ~BOTTOM] != free[:, ~BOTTOM]).any())
    assert len({tuple(gradient.flatten().tolist()) for gradient in got.values()}) == 4


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("around", ["backward", "both"])
def test_a_context_around_backward_alone_acts_as_one_around_the_forward_pass(policy, around):
    """Both ways of writing the training loop give the same gradients, bit for bit."""
    assert torch.equal(_gradients(policy, around), _gradients(policy, "forward"))


def test_reject_learns_through_coverage_alone():
    """Under REJECT what remains is exactly the gradient of the coverage term."""
    got = _gradients(GradientPolicy.REJECT, "forward", coverage_weight=3.0)
    with_coverage = _gradients(None, "forward", coverage_weight=3.0)
    without = _gradients(None, "forward")
    assert bool((got[1] != 0).any())
    assert bool((got[0] == 0).all())
    torch.testing.assert_close(got, with_coverage - without, rtol=1e-4, atol=1e-4)


def test_four_policies_train_a_head_four_ways():
    """A pattern head ends in four different states, and under REJECT where it began."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 2, generator=generator)
    targets = lift_semantic_targets(x[:, 0] * 2, torch.where(x[:, 1] > 1, 3, 0))
    ends = {}
    for policy in (None, *ALL):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            head = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        start = torch.nn.utils.parameters_to_vector(head.parameters()).detach().clone()
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            P, Q = head(x).unbind(-1)
            if policy is None:
                _loss(P, Q, targets, scale=200.0).backward()
            else:
                with gradient_policy(policy, tau=0.2):
                    _loss(P, Q, targets, scale=200.0).backward()
            optimizer.step()
        end = torch.nn.utils.parameters_to_vector(head.parameters()).detach()
        ends[policy] = tuple(end.tolist())
        assert torch.equal(end, start) == (policy is GradientPolicy.REJECT)
    assert ends[GradientPolicy.PASSTHROUGH] == ends[None]
    assert len({ends[policy] for policy in ALL}) == 4


def test_a_bottom_that_is_not_a_number_sends_nothing_back():
    """CLAMP, PROJECT and REJECT stop the nan of a broken row; PASSTHROUGH and no policy show it."""
    P, Q, targets = _batch()
    with torch.no_grad():
        P[0] = math.nan
    for policy in (*ALL, None):
        P.grad = Q.grad = None
        if policy is None:
            _loss(P, Q, targets).backward()
        else:
            with gradient_policy(policy, tau=TAU):
                _loss(P, Q, targets).backward()
        shows = policy in (None, GradientPolicy.PASSTHROUGH)
        assert bool(P.grad.isnan().any()) == shows
        assert not bool(P.grad[1:].isnan().any())


def test_a_denominator_shared_by_several_numerators_is_gated_as_a_whole():
    """One bottom numerator makes the shared denominator's entry a bottom."""
    P = torch.tensor([[1.0, math.inf], [1.0, 2.0]], requires_grad=True)
    Q = torch.tensor([[1.0], [1.0]], requires_grad=True)
    with gradient_policy(GradientPolicy.PROJECT):
        p, q = gate_tuple(P, Q)
    (p.sum() + q.sum()).backward()
    assert P.grad.tolist() == [[1, 0], [1, 1]]
    assert Q.grad.tolist() == [[0], [1]]


# --- gates ----------------------------------------------------------------------------------------


def _is_gated(P, Q):
    p, q = gate_tuple(P, Q)
    return p is not P and q is not Q


def test_where_gates_are_put():
    """A gate is put where a policy is or may still come into force, and nowhere else."""
    P, Q = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert _is_gated(P, Q)
    with gradient_policy(GradientPolicy.CLAMP):
        assert _is_gated(P, Q)
        assert not _is_gated(P.detach(), Q.detach())
        with policies_disabled():
            assert not _is_gated(P, Q)
        with torch.no_grad():
            assert not _is_gated(P, Q)
    with policies_disabled():
        assert not _is_gated(P, Q)
    with torch.no_grad():
        assert not _is_gated(P, Q)
    seen = []
    torch.func.grad(lambda p: seen.append(_is_gated(p, p)) or p.sum())(P.detach())
    torch.func.vmap(lambda p: seen.append(_is_gated(p, p)) or p)(P.detach())
    assert seen == [False, False]


def test_disabled_policies_stay_out_of_backward_too():
    """A graph built with policies disabled has nothing that a later context could act on."""
    P, Q, targets = _batch()
    with policies_disabled():
        loss = _loss(P, Q, targets)
    with gradient_policy(GradientPolicy.REJECT):
        loss.backward()
    assert bool((P.grad != 0).any())


def test_late_gates_die_with_their_graph():
    """Neither the registry nor the hooks keep a graph alive."""
    P, Q, targets = _batch()
    gc.collect()
    before = len(policies._LOCAL.gates)
    loss = _loss(P, Q, targets)
    gates = [weakref.ref(gate) for gate in policies._LOCAL.gates]
    assert len(gates) > before
    with gradient_policy(GradientPolicy.CLAMP):
        loss.backward()
    del loss
    gc.collect()
    assert len(policies._LOCAL.gates) == before
    assert sum(gate() is not None for gate in gates) == before


def test_gates_do_not_add_up_over_a_training():
    """After many steps only the last step's gates are alive."""
    for _ in range(20):
        P, Q, targets = _batch()
        loss = _loss(P, Q, targets)
        loss.backward()
    assert len(policies._LOCAL.gates) <= 2


def test_a_policy_reaches_gates_whose_backward_runs_on_another_thread():
    """The engine's device threads see no context variable: there the context that is told counts."""
    P, Q, targets = _batch()
    loss = _loss(P, Q, targets)

    def backward_elsewhere():
        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()

    with gradient_policy(GradientPolicy.REJECT):
        backward_elsewhere()
    assert bool((P.grad == 0).all())
    P, Q, targets = _batch()
    loss = _loss(P, Q, targets)
    with gradient_policy(GradientPolicy.REJECT):
        pass
    backward_elsewhere()
    assert bool((P.grad != 0).any())


def test_leaving_an_inner_context_puts_the_outer_one_back_into_gates():
    """For backward passes on other threads as on this one."""
    P, Q, targets = _batch()
    loss = _loss(P, Q, targets)
    with gradient_policy(GradientPolicy.REJECT):
        with gradient_policy(GradientPolicy.PASSTHROUGH):
            pass
        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()
    assert bool((P.grad == 0).all())


def test_a_thread_that_has_a_context_of_its_own_uses_it():
    """What the thread of the forward pass is told counts only where the other one is told nothing."""
    P, Q, targets = _batch()
    loss = _loss(P, Q, targets)

    def backward_freely():
        with gradient_policy(GradientPolicy.PASSTHROUGH):
            loss.backward()

    with gradient_policy(GradientPolicy.REJECT):
        worker = threading.Thread(target=backward_freely)
        worker.start()
        worker.join()
    assert bool((P.grad != 0).any())


def test_threads_do_not_see_each_others_contexts_in_backward():
    """A context in one thread leaves the backward pass of another as it is."""
    entered, done = threading.Event(), threading.Event()

    def other():
        with gradient_policy(GradientPolicy.REJECT):
            entered.set()
            done.wait(10)

    worker = threading.Thread(target=other)
    worker.start()
    assert entered.wait(10)
    free = _gradients(None, "forward")
    done.set()
    worker.join()
    assert bool((free != 0).any())


def test_one_policy_per_trial_in_a_stack():
    """Under vmap(grad), a tensor of codes gives each trial its own policy."""
    codes = torch.tensor([POLICY_CODES[policy] for policy in ALL])
    x = torch.tensor([3.0, -0.5, 2.0])
    bottom = torch.tensor([False, False, True])

    def loss(values, code):
        return (gate_gradients(values, bottom, code) * torch.tensor([5.0, 0.25, 7.0])).sum()

    got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(x, codes)
    expected = {
        GradientPolicy.CLAMP: [1, 0.25, 0],
        GradientPolicy.PROJECT: [5, 0.25, 0],
        GradientPolicy.REJECT: [0, 0, 0],
        GradientPolicy.PASSTHROUGH: [5, 0.25, 7],
    }
    assert got.tolist() == [expected[policy] for policy in ALL]


@pytest.mark.parametrize("policy", ALL)
def test_an_active_policy_acts_inside_of_transforms(policy):
    """vmap(grad) of the objective under a context gives the gradients of separate passes under it."""
    P, Q, targets = _batch()
    stack = torch.stack((P.detach(), P.detach() * -2)), torch.stack((Q.detach(), Q.detach() * 3))

    with gradient_policy(policy, tau=TAU):
        got = torch.func.vmap(torch.func.grad(lambda p, q: _loss(p, q, targets), argnums=(0, 1)))(*stack)
        for k in range(2):
            p, q = (x[k].clone().requires_grad_() for x in stack)
            for gradient, alone in zip(got, torch.autograd.grad(_loss(p, q, targets), (p, q)), strict=True):
                torch.testing.assert_close(gradient[k], alone)


@pytest.mark.parametrize("policy", [None, *ALL])
@pytest.mark.parametrize("around", ["forward", "backward"])
@pytest.mark.parametrize("term", ["margin", "sign", "push_down", "push_up"])
def test_each_term_may_be_the_only_one(term, around, policy):
    """A member that no term reaches has no gradient to treat, and nothing else changes for that."""
    gradients = []
    for both in (True, False):
        P, Q, targets = _batch()
        weights = dict.fromkeys(("margin", "sign", "push_down", "push_up"), 0.0) | {term: 5.0}
        early = policy is not None and around == "forward"
        with gradient_policy(policy) if early else contextlib.nullcontext():
            total, _ = SCMTrainingLoss(LossConfig(tau_train=TAU))(
                torch.zeros(()), P, Q, targets.Y_n, targets.Y_d, weights=weights
            )
            if both:  # the other member takes part as well, with a gradient of 0
                total = total + 0.0 * (P.sum() + Q.sum())
        with contextlib.nullcontext() if policy is None else gradient_policy(policy):
            total.backward()
        gradients.append([torch.zeros_like(x) if x.grad is None else x.grad for x in (P, Q)])
    assert torch.equal(torch.stack(gradients[0]), torch.stack(gradients[1]))


# --- many trials as one ---------------------------------------------------------------------------


def test_a_context_of_codes_gives_each_trial_its_own_policy():
    """Under vmap(grad) the whole objective treats each trial as the context of its own policy would."""
    P, Q, targets = _batch()
    codes = torch.tensor([POLICY_CODES[policy] for policy in ALL])

    def objective(p, q, code):
        with gradient_policy(code, tau=TAU):
            return _loss(p, q, targets, coverage_weight=3.0)

    stacked = torch.func.vmap(torch.func.grad(objective, argnums=(0, 1)), in_dims=(None, None, 0))(
        P.detach(), Q.detach(), codes
    )
    for k, policy in enumerate(ALL):
        alone = _gradients(policy, "both", coverage_weight=3.0)
        torch.testing.assert_close(torch.stack([gradient[k] for gradient in stacked]), alone)


def test_codes_reach_layers_and_the_hard_coverage():
    """What asks for the policy in force gets the codes; who can only take one policy says so."""
    x = torch.tensor([0.5, 2.0])
    layer = SCMRationalLayer(1, 1, gradient_policy=None)
    expected = {}
    for policy in ALL:
        layer.zero_grad()
        with gradient_policy(policy):
            (50 * layer(x)[0].sum()).backward()
        expected[policy] = layer.numerator.grad.clone()
    bottoms = torch.tensor([True, True, False])
    for policy in ALL:
        code = torch.tensor(POLICY_CODES[policy])
        layer.zero_grad()
        with gradient_policy(code):
            (50 * layer(x)[0].sum()).backward()
            in_context = rejection_loss(bottoms)
            with pytest.raises(TypeError, match="got a tensor of codes"):
                get_policy()
        assert torch.equal(layer.numerator.grad, expected[policy])
        assert torch.equal(in_context, rejection_loss(bottoms, policy=policy))
    assert len({tuple(gradient.tolist()) for gradient in expected.values()}) == 3  # no bottoms here


# --- scaled gradients -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("around", ["forward", "backward"])
def test_a_gradient_scale_changes_no_policy(policy, around):
    """Gradients of the scaled loss are the scaled gradients, clamped in units of the unscaled loss."""
    expected = _gradients(policy, around)
    P, Q, targets = _batch()
    scale = torch.tensor(2.0**10)
    with scaled_gradients(scale), contextlib.ExitStack() as stack:
        if around == "forward":
            stack.enter_context(gradient_policy(policy, tau=TAU))
        loss = _loss(P, Q, targets)
    with gradient_policy(policy, tau=TAU):
        (loss * scale).backward()
    assert torch.equal(torch.stack((P.grad, Q.grad)) / scale, expected)


def test_a_gradient_scale_reaches_layers():
    """CLAMP at a layer's output clamps in units of the unscaled loss, early and late, one code or many."""
    scale = torch.tensor(2.0**10)
    for late in (False, True):
        gradients = []
        for factor in (torch.tensor(1.0), scale):
            x = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
            with scaled_gradients(factor), contextlib.ExitStack() as stack:
                if not late:
                    stack.enter_context(gradient_policy(GradientPolicy.CLAMP))
                y, _ = SCMNorm()(x)
                loss = (y * torch.tensor([5.0, 0.5, -3.0])).sum()
            (loss * factor).backward()
            gradients.append(x.grad / factor)
        torch.testing.assert_close(*gradients)
    x = torch.ones(2, requires_grad=True)
    with scaled_gradients(scale):
        gated = gate_gradients(x, torch.zeros(2, dtype=torch.bool), torch.tensor([0, 1]))
    (gated * 5000).sum().backward()
    assert x.grad.tolist() == [2.0**10, 5000.0]
