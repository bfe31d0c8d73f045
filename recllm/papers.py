"""The papers whose methods are here, and how to cite them. recllm.json names those of a checkpoint by their keys."""

import dataclasses
from collections.abc import Sequence

from recllm.errors import UserError


@dataclasses.dataclass(frozen=True)
class Paper:
    """What a model made by a method has to cite."""

    key: str
    title: str
    authors: tuple[str, ...]
    year: int
    url: str
    kind: str = "misc"  # of the BibTeX entry

    @property
    def bibtex(self) -> str:
        name = self.authors[0].split()[-1].lower()
        fields = {"title": f"{{{self.title}}}", "author": " and ".join(self.authors), "year": self.year}
        lines = [f"  {field:<6} = {{{value}}}," for field, value in (fields | {"url": self.url}).items()]
        return "\n".join([f"@{self.kind}{{{name}{self.year}{self.key},", *lines, "}"])


TRL = Paper(
    "trl",
    "TRL: Transformers Reinforcement Learning",
    (
        "Leandro von Werra", "Younes Belkada", "Lewis Tunstall", "Edward Beeching", "Tristan Thrush",
        "Nathan Lambert", "Shengyi Huang", "Kashif Rasul", "Quentin Gallouédec",
    ),
    2020,
    "https://github.com/huggingface/trl",
    "software",
)  # fmt: skip
PAPERS = {
    paper.key: paper
    for paper in (
        Paper(
            "gream",
            "Generative Reasoning Recommendation via LLMs",
            (
                "Minjie Hong", "Zetong Zhou", "Zirun Guo", "Ziang Zhang", "Ruofan Hu", "Weinan Gan", "Jieming Zhu",
                "Zhou Zhao",
            ),
            2025,
            "https://arxiv.org/abs/2510.20815",
        ),
        Paper(
            "grc",
            "Learning to Reflect and Correct: Towards Better Decoding Trajectories for Large-Scale Generative "
            "Recommendation",
            ("Haibo Xing", "Hao Deng", "Lingyu Mu", "Jinxin Hu", "Yu Zhang", "Xiaoyi Zeng", "Jing Zhang"),
            2026,
            "https://arxiv.org/abs/2602.23639",
        ),
        Paper(
            "recast",
            "ReCast: Recasting Learning Signals for Reinforcement Learning in Generative Recommendation",
            ("Peiyan Zhang", "Hanmo Liu", "Chengxuan Tong", "Yuxia Wu", "Wei Guo", "Yong Liu"),
            2026,
            "https://arxiv.org/abs/2604.22169",
        ),
        Paper(
            "rclrec",
            "RCLRec: Reverse Curriculum Learning for Modeling Sparse Conversions in Generative Recommendation",
            (
                "Yulei Huang", "Hao Deng", "Haibo Xing", "Jinxin Hu", "Chuanfei Xu", "Zulong Chen", "Yu Zhang",
                "Xiaoyi Zeng",
            ),
            2026,
            "https://arxiv.org/abs/2603.28124",
        ),
        Paper(
            "tiger",
            "Recommender Systems with Generative Retrieval",
            (
                "Shashank Rajput", "Nikhil Mehta", "Anima Singh", "Raghunandan H. Keshavan", "Trung Vu",
                "Lukasz Heldt", "Lichan Hong", "Yi Tay", "Vinh Q. Tran", "Jonah Samost", "Maciej Kula", "Ed H. Chi",
                "Maheswaran Sathiamoorthy",
            ),
            2023,
            "https://arxiv.org/abs/2305.05065",
        ),
    )
}  # fmt: skip


def papers_of(keys: Sequence[str]) -> list[Paper]:
    for key in keys:
        if key not in PAPERS:
            raise UserError(f"{key!r} is no paper that a card can cite", fix=f"one of {', '.join(PAPERS)}")
    return [PAPERS[key] for key in keys]
