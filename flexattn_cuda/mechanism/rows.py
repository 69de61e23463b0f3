"""Which query rows of a call see high-resolution (HR) keys, and whose selection each of them uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexattn_cuda.mechanism.config import FlexAttnConfig


@dataclass
class Rows:
    """Query rows of one call that see HR keys; exactly one of `first` and `listed` is given.

    Attributes:
        first: [B] int32: all rows from there on see HR keys, with the selection of the call's last row.
        listed: [B, R] int32: these rows see HR keys, -1 for none.
        owner: [B, R] int64 positions in `listed`: each listed row uses the selection of that row. None where every row
            has its own.
    """

    first: torch.Tensor | None = None
    listed: torch.Tensor | None = None
    owner: torch.Tensor | None = None

    @property
    def batch(self) -> int:
        rows = self.listed if self.first is None else self.first
        assert rows is not None
        return rows.shape[0]

    @classmethod
    def of_answers(cls, config: FlexAttnConfig, labels: torch.Tensor) -> Rows:
        """Return the rows of training and scoring: x-1 to y-1 of every answer at positions x to y.

        Args:
            config: Settings of the mechanism.
            labels: [B, N]; a label other than -100 is an answer token.
        """
        batch, length = labels.shape
        predicts = torch.zeros_like(labels, dtype=torch.bool)
        predicts[:, :-1] = labels[:, 1:] != -100
        order = torch.arange(length, device=labels.device).expand(batch, -1)
        if config.hr_rows == "answer":
            count = int(predicts.sum(-1).max())
            position = predicts.cumsum(-1) - 1
            listed = labels.new_full((batch, count + 1), -1)  # an extra column takes the rows that predict nothing
            listed.scatter_(1, torch.where(predicts, position, count), torch.where(predicts, order, -1))
            return cls(listed=listed[:, :count].to(torch.int32))
        # Every row sees HR keys, with the selection of the next row that predicts an answer token (the last such row
        # after the last answer): as in inference, where prompt rows share the last prompt row's selection.
        upcoming = torch.where(predicts, order, length).flip(-1).cummin(-1).values.flip(-1)
        last = torch.where(predicts, order, -1).amax(-1, keepdim=True).expand(-1, length)
        owner = torch.where(upcoming < length, upcoming, torch.where(last >= 0, last, order))
        return cls(listed=order.to(torch.int32).contiguous(), owner=owner)

    @classmethod
    def of_a_token(cls, batch: int, device: torch.device) -> Rows:
        """Return the one row of a decoding step."""
        return cls(listed=torch.zeros(batch, 1, dtype=torch.int32, device=device))

    @classmethod
    def of_generation(
        cls, config: FlexAttnConfig, batch: int, past: int, queries: int, prompt_length: int, device: torch.device
    ) -> Rows | None:
        """Return the rows of inference: the last prompt row and every later one; None if the call ends before it.

        Args:
            config: Settings of the mechanism.
            batch: B.
            past: Positions before this call.
            queries: Positions of this call.
            prompt_length: Positions up to the end of the prompt.
            device: Of the result.

        Raises:
            ValueError: If all prompt rows see HR tokens and this call ends before the prompt does.
        """
        last_prompt_row = prompt_length - 1 - past  # of this call; negative if an earlier call had it
        if last_prompt_row >= queries:
            if config.hr_rows == "all":
                raise ValueError(
                    "with hr_rows='all' (the paper's form) every prompt row needs the last prompt row's selection: "
                    f"pass all {prompt_length} prompt positions in one call, not only the first {past + queries}"
                )
            return None
        if config.hr_rows == "all" and last_prompt_row > 0:
            if last_prompt_row == queries - 1:
                return cls(first=torch.zeros(batch, dtype=torch.int32, device=device))
            order = torch.arange(queries, device=device).expand(batch, -1)
            return cls(listed=order.to(torch.int32).contiguous(), owner=order.clamp(min=last_prompt_row))
        listed = torch.arange(max(last_prompt_row, 0), queries, dtype=torch.int32, device=device)
        return cls(listed=listed.expand(batch, -1).contiguous())
