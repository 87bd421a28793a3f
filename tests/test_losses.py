import math

import pytest
import torch
import torch.nn.functional as F

from cosup.losses import _CHUNK, accurate, distinct, nearest, nsp, ntp, targets

NONE_OF_3 = torch.zeros(3, 3, dtype=torch.bool)


def _random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def _nsp(queries_KD, candidates_ND, gold, *, ignored=(), temperature=1.0):
    ignore_KN = torch.zeros(len(queries_KD), len(candidates_ND), dtype=torch.bool)
    for query, candidate in ignored:
        ignore_KN[query, candidate] = True
    gold_K = torch.tensor(gold, dtype=torch.int64)
    return nsp(queries_KD, candidates_ND, gold_K=gold_K, ignore_KN=ignore_KN, temperature=temperature)


# nsp


@pytest.mark.parametrize("temperature", [0.05, 1.0, 3.0])
@pytest.mark.parametrize("count", [2, 7])
def test_nsp_of_orthonormal_vectors_has_its_closed_form(count, temperature):
    vectors = torch.eye(count, dtype=torch.float64)
    at_gold = math.exp(1 / temperature)
    expected = count * -math.log(at_gold / (at_gold + count - 1))
    loss = _nsp(vectors, vectors, range(count), temperature=temperature)
    torch.testing.assert_close(loss.item(), expected, rtol=1e-12, atol=1e-12)


def test_nsp_of_equal_candidates_is_the_log_of_their_number_for_each_position():
    loss = _nsp(_random(3, 4), torch.ones(5, 4, dtype=torch.float64), [0, 4, 2])
    torch.testing.assert_close(loss.item(), 3 * math.log(5))


def test_nsp_of_a_single_candidate_is_zero():
    assert _nsp(_random(2, 4), _random(1, 4), [0, 0]).item() == 0


def test_nsp_gradients_are_those_of_the_softmax():
    queries, candidates = _random(3, 4).requires_grad_(), _random(5, 4, seed=1).requires_grad_()
    _nsp(queries, candidates, [0, 4, 4], temperature=0.5).backward()
    errors_KN = (queries @ candidates.T / 0.5).softmax(1) - F.one_hot(torch.tensor([0, 4, 4]), 5)
    torch.testing.assert_close(queries.grad, errors_KN @ candidates / 0.5)
    torch.testing.assert_close(candidates.grad, errors_KN.T @ queries / 0.5)


def test_a_smaller_temperature_is_the_same_as_longer_queries():
    queries, candidates = _random(3, 4), _random(5, 4, seed=1)
    torch.testing.assert_close(
        _nsp(queries, candidates, [0, 1, 2], temperature=0.1), _nsp(queries * 10, candidates, [0, 1, 2])
    )


def test_an_ignored_candidate_has_no_influence_on_loss_and_gradients():
    queries, candidates = _random(2, 4), _random(5, 4, seed=1)

    def loss_and_gradients(candidates, gold, ignored):
        leaves = queries.clone().requires_grad_(), candidates.clone().requires_grad_()
        loss = _nsp(*leaves, gold, ignored=ignored)
        return loss, *torch.autograd.grad(loss, leaves)

    loss, query_grad, candidate_grad = loss_and_gradients(candidates, [0, 3], [(0, 1), (1, 1)])
    bare = loss_and_gradients(candidates[[0, 2, 3, 4]], [0, 2], [])
    torch.testing.assert_close((loss, query_grad, candidate_grad[[0, 2, 3, 4]]), bare)
    assert not candidate_grad[1].any()


def test_a_candidate_is_ignored_only_for_the_positions_that_say_so():
    queries, candidates = _random(2, 4), _random(3, 4, seed=1)
    one_by_one = _nsp(queries[:1], candidates[[0, 2]], [0]) + _nsp(queries[1:], candidates, [2])
    torch.testing.assert_close(_nsp(queries, candidates, [0, 2], ignored=[(0, 1)]), one_by_one)


def test_a_passage_that_positions_share_stands_once():
    queries, candidates = _random(2, 4), _random(2, 4, seed=1)
    one_by_one = sum(_nsp(queries[i : i + 1], candidates, [1]) for i in range(2))
    torch.testing.assert_close(_nsp(queries, candidates, [1, 1]), one_by_one)
    assert _nsp(queries, candidates[[0, 1, 1]], [1, 1]) > one_by_one


def test_no_positions_give_zero_with_gradients_of_zero():
    queries, candidates = _random(0, 4).requires_grad_(), _random(3, 4).requires_grad_()
    loss = _nsp(queries, candidates, [])
    loss.backward()
    assert loss.item() == 0
    assert queries.grad.shape == (0, 4)
    assert torch.equal(candidates.grad, torch.zeros(3, 4, dtype=torch.float64))


# ntp


def _head(weight, bias=None):
    return lambda states: F.linear(states, weight, bias)


def test_ntp_of_a_head_of_zeros_is_the_log_of_the_vocabulary_for_each_token():
    loss = ntp(_random(5, 4), _head(torch.zeros(7, 4, dtype=torch.float64)), torch.arange(5))
    torch.testing.assert_close(loss.item(), 5 * math.log(7))


def test_ntp_of_orthonormal_states_and_head_has_its_closed_form():
    states, head = torch.eye(3, dtype=torch.float64) * 2, torch.eye(3, dtype=torch.float64)
    expected = 3 * -math.log(math.exp(2) / (math.exp(2) + 2))
    torch.testing.assert_close(ntp(states, _head(head), torch.arange(3)).item(), expected)


def test_the_bias_of_the_head_counts():
    bias = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
    loss = ntp(_random(1, 4), _head(torch.zeros(2, 4, dtype=torch.float64), bias), torch.tensor([1]))
    torch.testing.assert_close(loss.item(), -math.log(3 / 4))


def test_no_labelled_tokens_give_zero_with_gradients_of_zero():
    states, head = _random(0, 4).requires_grad_(), _random(7, 4).requires_grad_()
    loss = ntp(states, _head(head), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert not head.grad.any()


@pytest.mark.parametrize("count", [_CHUNK, _CHUNK + 1, 2 * _CHUNK + 5])
@pytest.mark.parametrize("biased", [False, True])
def test_tokens_taken_in_chunks_give_the_loss_and_gradients_of_all_at_once(count, biased):
    labels = torch.arange(count) % 11
    leaves = [_random(count, 4), _random(11, 4, seed=1), _random(11, seed=2)][: 3 if biased else 2]
    for leaf in leaves:
        leaf.requires_grad_()
    states, head, bias = [*leaves, None][:3]
    loss = ntp(states, _head(head, bias), labels)
    whole = F.cross_entropy(F.linear(states, head, bias), labels, reduction="sum")
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    for gradient, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(whole, leaves), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_logits_of_chunks_are_not_kept_for_the_backward_pass():
    kept = []

    def note(tensor):
        kept.append(tensor.shape)
        return tensor

    states = _random(2 * _CHUNK, 4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ntp(states, _head(_random(11, 4)), torch.zeros(2 * _CHUNK, dtype=torch.int64))
    assert (_CHUNK, 11) not in kept
    assert kept


# Accuracy


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
@pytest.mark.parametrize("count", [0, 3])
def test_losses_are_float32_or_float64_whatever_the_states_are(dtype, expected, count):
    states, head = _random(count, 4, dtype=torch.float32).to(dtype), _random(5, 4, dtype=torch.float32).to(dtype)
    assert ntp(states, _head(head), torch.arange(count)).dtype == expected
    assert _nsp(states, head, range(count)).dtype == expected
    assert accurate(states).dtype == expected


def test_similarities_of_bfloat16_states_are_not_rounded_to_bfloat16():
    queries, candidates = (_random(n, 64, seed=n, dtype=torch.float32).bfloat16() for n in (6, 9))
    exact = _nsp(queries.double(), candidates.double(), range(6))
    torch.testing.assert_close(_nsp(queries, candidates, range(6)).double(), exact, rtol=1e-5, atol=0)
    rounded = F.cross_entropy((queries @ candidates.T).float(), torch.arange(6), reduction="sum")
    assert abs(rounded - exact) > 1e-3 * exact


# nearest


def test_nearest_is_the_best_candidate_that_is_not_ignored():
    queries = torch.eye(3)
    candidates = torch.tensor([[1.0, 5.0, 0.0], [3.0, 4.0, 0.0], [2.0, 0.0, 1.0]])
    assert nearest(queries, candidates, ignore_KN=NONE_OF_3).tolist() == [1, 0, 2]
    ignore_KN = NONE_OF_3.clone()
    ignore_KN[0, 1] = ignore_KN[1, 0] = True
    found = nearest(queries, candidates, ignore_KN=ignore_KN)
    assert found.tolist() == [2, 1, 2]
    assert found.dtype == torch.int64


def test_nearest_of_no_queries_is_empty():
    assert nearest(torch.zeros(0, 3), torch.eye(3), ignore_KN=torch.zeros(0, 3, dtype=torch.bool)).tolist() == []


# Candidates of several processes


def test_the_first_vector_of_a_key_stands_for_all_and_those_of_nobody_are_left_out():
    keys = torch.tensor([7, 3, -1, 7, 5, 3])
    vectors = torch.arange(12, dtype=torch.float64).reshape(6, 2).requires_grad_()
    known, chosen = distinct(keys, vectors)
    assert known.tolist() == [3, 5, 7]
    assert torch.equal(chosen, vectors[[1, 4, 0]])
    chosen.sum().backward()
    assert vectors.grad.any(1).tolist() == [True, True, False, False, True, False]


def test_golds_and_ignored_are_found_by_key_and_unknown_ones_are_passed_over():
    keys = torch.tensor([3, 5, 7])
    gold, ignore = targets(keys, torch.tensor([7, 3]), torch.tensor([[0, 0, 1, 1], [3, 99, 4, 7]]))
    assert gold.tolist() == [2, 0]
    assert ignore.tolist() == [[True, False, False], [False, False, True]]


def test_without_candidates_there_is_nothing_to_find():
    gold, ignore = targets(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(2, 0).long())
    assert gold.shape == (0,)
    assert ignore.shape == (0, 0)
