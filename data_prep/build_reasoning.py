"""Have a teacher explain training events: history → a chain in five stages → next item. Writes FOLDER/reasoning.

python data_prep/build_reasoning.py --data runs/mine                                         # templates, no model
python data_prep/build_reasoning.py --data runs/mine --teacher openai --teacher_model MODEL --estimate_only
python data_prep/build_reasoning.py --data runs/mine --teacher openai --teacher_model MODEL --base_url http://localhost:8000/v1
python data_prep/build_reasoning.py --data runs/mine --teacher vllm --teacher_model MODEL --users 10000

What is written is kept in FOLDER/reasoning.cache.jsonl: interrupted, the same command goes on where it stopped.
"""

from recllm import launch
from recllm.mixtures.reasoning import ReasoningConfig, build_reasoning
from recllm.mixtures.teacher_answers import DROPS
from recllm.teacher import TeacherConfig


def main(config: ReasoningConfig, teacher: TeacherConfig) -> None:
    mixture = build_reasoning(config, teacher)
    if mixture is None:
        return
    report, example = mixture.report, mixture.examples[0]
    print(f"chains     {len(mixture.examples):,} of {report['users']:,} users")
    print(f"words      {report['mean_words']:.0f} in the three steps, on average")
    print(f"denoised   {report['denoised']:.1%} of the items shown, in {report['denoised_chains']:.1%} of the chains")
    for reason, count in report["dropped"].items():
        print(f"dropped    {count:,} {reason}: {DROPS[reason]}")
    print(f"written to {config.folder}\n\n{example['prompt']}{example['completion']}")


if __name__ == "__main__":
    launch.run(main, ReasoningConfig, TeacherConfig, description=__doc__)
