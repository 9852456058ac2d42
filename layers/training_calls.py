"""The training calls of VSE++ and the codes derived from it, so that their train.py runs here.

In these codes a model owns its optimizer, its loss and its log, and `model.train_emb(*batch)` is a
training step. `model.VSE` and `model.SCAN` inherit the same names from `TrainingCalls`. train.py
here uses none of them: nothing is made before its first use, and nothing of it is part of a model's
state, copy or pickle.
"""

import copy
from collections import OrderedDict

import torch

from runtime.errors import InputError

DECAY = 0.01  # VSE-infinity leaves AdamW's weight decay at PyTorch's default
OWN = "_training"  # the attribute that holds what has been made so far


class States(OrderedDict):
    """A model's flat state dict that can also be read as the released [image state, text state].

    By name it is what nn.Module expects, and `states[0]`, `states[1]` are the two encoders' states.
    A file written by torch.save holds the two states under 0 and 1, in an OrderedDict, so it opens
    without this class, and the released `load_state_dict` takes it. If the model has more parts, as
    a subclass may, the file holds the flat state.
    """

    PARTS = ("img_enc.", "txt_enc.")

    def __getitem__(self, key):
        if not isinstance(key, int):
            return super().__getitem__(key)
        start = self.PARTS[key]
        return OrderedDict(
            (name.removeprefix(start), value)
            for name, value in self.items()
            if name.startswith(start)
        )

    def __reduce__(self):
        whole = all(name.startswith(self.PARTS) for name in self)
        parts = [(0, self[0]), (1, self[1])] if whole else list(self.items())
        return OrderedDict, (), None, None, iter(parts)

    def __copy__(self):
        return States(self)

    def __deepcopy__(self, memo):
        return States((name, copy.deepcopy(value, memo)) for name, value in self.items())


def both_states(state_dict):
    """(Image state, text state) of a state dict in any form; None if it has neither.

    The forms: the released list of two, `States` or what torch.save wrote of it, and a flat state
    dict, also with what DataParallel or torch.compile put before each name.
    """
    if isinstance(state_dict, (list, tuple)):
        return tuple(state_dict) if len(state_dict) == 2 else None
    if state_dict.keys() == {0, 1}:
        return state_dict[0], state_dict[1]
    flat = States(
        (str(name).removeprefix("module.").removeprefix("_orig_mod."), value)
        for name, value in state_dict.items()
    )
    known = all(name.startswith(States.PARTS) for name in flat)
    return (flat[0], flat[1]) if flat and known else None


def _own(name, first):
    """A property of a model whose first value is `first(model)`; it can be set."""

    def get(model):
        own = vars(model).setdefault(OWN, {})
        if name not in own:
            try:
                own[name] = first(model)
            except AttributeError as error:  # nn.Module would say that the model lacks `name`
                raise InputError(
                    f"the model's {name} needs an option that it was not given ({error}): set it "
                    "in the options that the model is made with"
                ) from error
        return own[name]

    def put(model, value):
        vars(model).setdefault(OWN, {})[name] = value

    return property(get, put)


def _trained(model):
    """What the optimizer changes: text encoder, image encoder without a frozen CNN, loss."""
    parts = (model.txt_enc, model.img_enc, model.criterion)
    return [weight for part in parts for weight in part.parameters() if weight.requires_grad]


def _optimizer(model):
    """Adam over `params`, or AdamW for VSE-infinity's options and those with a weight_decay.

    As the released constructors do, it moves a model on the CPU to the GPU if there is one.
    """
    if torch.cuda.is_available() and model.device.type == "cpu":
        model.cuda()
        model.criterion.cuda()
    opt = model.opt
    decay = getattr(opt, "weight_decay", DECAY * hasattr(opt, "vse_mean_warmup_epochs"))
    if decay:
        return torch.optim.AdamW(model.params, lr=opt.learning_rate, weight_decay=decay)
    return torch.optim.Adam(model.params, lr=opt.learning_rate)


class TrainingCalls(torch.nn.Module):
    """What a released model owns beside its weights, and its training step.

    A subclass has `opt`, `device`, `img_enc`, `txt_enc`, `forward_emb` and `make_criterion()`.
    opt needs learning_rate and grad_clip, and what the loss reads.

    criterion: the loss. params: the weights that are trained. optimizer: over `params`.
    grad_clip: the largest gradient norm; 0 does not clip. Eiters: steps so far.
    logger: anything with `update(name, value, n)`, such as a LogCollector; None logs nothing.
    """

    criterion = _own("criterion", lambda model: model.make_criterion().to(model.device))
    params = _own("params", _trained)
    optimizer = _own("optimizer", _optimizer)
    grad_clip = _own("grad_clip", lambda model: model.opt.grad_clip)
    logger = _own("logger", lambda model: None)
    Eiters = _own("Eiters", lambda model: 0)

    def __setattr__(self, name, value):
        if name == "criterion":  # nn.Module would make a loss part of the model's state
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != OWN}

    def state_dict(self, *arguments, **named):
        """This module's state as `States`; within another module's state, as nn.Module gives it."""
        flat = super().state_dict(*arguments, **named)
        if arguments or named:
            return flat
        states = States(flat)
        states._metadata = flat._metadata
        return states

    def _log(self, name, value, n=0):
        if self.logger is not None:
            self.logger.update(name, value, n)

    def forward_loss(self, img_emb, cap_emb, *rest, **named):
        """The scalar loss of `forward_emb`'s embeddings, which is logged as well.

        rest, named: SCAN's lengths of captions; HAL's mb_img, mb_cap, mb_ind and indices.
        """
        loss = self.criterion(img_emb, cap_emb, *rest, **named)
        # HAL's code logs it under another name than VSE++'s.
        name = "Loss" if hasattr(self.opt, "local_alpha") else "Le"
        self._log(name, loss.item(), len(img_emb))
        return loss

    def train_emb(
        self,
        images,
        captions,
        lengths,
        ids=None,
        indices=None,
        mb_img=None,
        mb_cap=None,
        mb_ind=None,
        *,
        image_lengths=None,
        warmup_alpha=None,
    ):
        """One training step on a batch; returns its loss, detached.

        images, captions, lengths: as for `forward_emb`.
        ids, indices: (B,) the captions' numbers. The bank leaves out the entries of `indices`, or
            of `ids` without them.
        mb_img, mb_cap, mb_ind: HAL's memory bank, as for `ContrastiveLoss`.
        image_lengths, warmup_alpha: VSE-infinity's fourth and fifth argument, also by place: the
            number of each image's regions, which are floats there, and a factor of the loss.
        """
        if isinstance(ids, torch.Tensor) and ids.is_floating_point():
            image_lengths, warmup_alpha, ids, indices = ids, indices, None, None
        self.Eiters += 1
        self._log("Eit", self.Eiters)
        self._log("lr", self.optimizer.param_groups[0]["lr"])
        more = {} if image_lengths is None else {"image_lengths": image_lengths}
        embeddings = self.forward_emb(images, captions, lengths, **more)
        numbers = ids if indices is None else indices
        bank = {} if mb_img is None else dict(mb_img=mb_img, mb_cap=mb_cap, mb_ind=mb_ind)
        loss = self.forward_loss(*embeddings, **bank, **({"indices": numbers} if bank else {}))
        if warmup_alpha is not None:
            loss = loss * warmup_alpha
        self.optimizer.zero_grad()
        loss.backward()
        if self.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.params, self.grad_clip)
        self.optimizer.step()
        return loss.detach()

    is_data_parallel = False

    def make_data_parallel(self):
        """Do nothing, for DataParallel would change no number: several GPUs take torchrun here."""

    def freeze_backbone(self, *_):
        """Refuse VSE-infinity's call for its grid encoder."""
        raise InputError(
            "freeze_backbone and unfreeze_backbone are left out here, for there is no backbone in "
            "the model: --finetune, or opt.finetune, decides whether a CNN is trained"
        )

    unfreeze_backbone = freeze_backbone

    def set_max_violation(self, max_violation):
        """VSE-infinity's switch between all negatives and the hardest ones."""
        self.criterion.max_violation = max_violation
