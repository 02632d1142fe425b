"""Where things stand on the page, and which button does what."""

import functools

import gradio as gr

from vcm_jax.web import results
from vcm_jax.web.look import LOOK, SCRIPT

_START = "Drop a video, then press the button: its sound appears here."


def build(page) -> gr.Blocks:
    """The blocks of a `Page`."""
    with gr.Blocks(
        title="Sound for silent videos",
        analytics_enabled=False,
        delete_cache=(600, 3600),  # seconds: look for files of visitors, and how old they may get
    ) as blocks:
        gr.HTML(page.head(), js_on_load=None)
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                inputs = _inputs(page)
            with gr.Column(scale=7, min_width=300):
                outputs = _outputs(page)
        _connect(page, inputs, outputs)
        blocks.unload(page.on_leave)
    blocks.queue(default_concurrency_limit=1, max_size=20, api_open=False)
    return blocks


def _inputs(page) -> dict[str, gr.components.Component]:
    """The left column: what is wanted."""
    limits, can, found = page.limits, page.models[0].can, {}
    with gr.Tabs():
        with gr.Tab("Video"):
            found["video"] = gr.Video(
                label=f"Video, at most {limits.megabytes:g} MB and {limits.seconds:g} s",
                sources=["upload"],
                height=220,
                elem_id="video",
            )
        with gr.Tab("Picture"):
            found["image"] = gr.Image(
                label=f"Picture, at most {limits.megabytes:g} MB",
                sources=["upload"],
                type="filepath",
                format="png",
                height=220,
                buttons=[],
                elem_id="image",
            )
    for component in (found["video"], found["image"]):
        _refuse_addresses(component)
    if page.examples:
        found["examples"] = gr.Dataset(
            components=[gr.Video(visible=False)],
            samples=[[str(path)] for path, _ in page.examples],
            type="index",
            layout="gallery",
            label="Or one of the model's test clips",
            elem_id="examples",
        )
    found["prompt"] = gr.Textbox(
        "",
        label="Prompt",
        placeholder="What is to be heard",
        info="Optional with a video or a picture; enough without one.",
        max_length=limits.letters,
        elem_id="prompt",
    )
    with gr.Row():
        steps = sorted({*page.steps, can.steps})
        found["steps"] = gr.Radio(
            steps, value=can.steps, label="Steps", min_width=140, scale=4, elem_id="steps"
        )
        found["takes"] = gr.Radio(
            list(range(1, limits.takes + 1)),
            value=1,
            label="Takes",
            min_width=140,
            scale=5,
            elem_id="takes",
        )
    with gr.Row():
        found["go"] = gr.Button("Make the sound", variant="primary", elem_id="go")
        found["cancel"] = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel")
    with gr.Accordion("Compare (A/B)", open=False):
        found |= _comparison(page, steps)
    with gr.Accordion("More: trim, seed, guidance", open=False):
        found |= _more(limits, can)
    return found


def _refuse_addresses(component) -> None:
    """Files are uploaded: gradio would fetch what a client names by its address."""
    keep = component.async_move_resource_to_block_cache

    async def move(path, *arguments, **options):
        if str(path).lower().startswith(("http:", "https:")):
            raise gr.Error("upload the file itself, not its address", print_exception=False)
        return await keep(path, *arguments, **options)

    component.async_move_resource_to_block_cache = move


def _comparison(page, steps) -> dict:
    modes = page.modes
    mode = gr.Radio(modes, value=modes[0], label="What to make", elem_id="mode")
    other = gr.Radio(
        steps, value=steps[-1], label="The other number of steps", elem_id="other", visible=False
    )
    mode.change(
        lambda chosen: gr.update(visible=chosen == page.by_steps),
        mode,
        other,
        queue=False,
        api_visibility="private",
    )
    blind = gr.Checkbox(
        True, label="Blind: which is which is shown after the vote", elem_id="blind"
    )
    return {"mode": mode, "other": other, "blind": blind}


def _more(limits, can) -> dict:
    found = {}
    with gr.Row():
        found["start"] = gr.Number(0, label="Start (s)", minimum=0, min_width=100)
        found["seconds"] = gr.Number(
            0, label="Length (s), 0: all", minimum=0, maximum=limits.seconds, min_width=100
        )
        found["seed"] = gr.Number(0, label="Seed", precision=0, min_width=100)
    guidance = can.guidance
    found["guidance"] = gr.Slider(
        min(guidance.default, guidance.lowest),
        guidance.highest,
        guidance.default,
        step=0.5,
        label="Guidance",
        info=guidance.info,
        elem_id="guidance",
    )
    found["negative"] = gr.Textbox(
        "",
        label="Negative prompt",
        info="What is not to be heard; needs guidance other than 0 and 1.",
        max_length=limits.letters,
        visible=can.negative_prompt,
        elem_id="negative",
    )
    return found


def _outputs(page) -> dict:
    """The right column: what was made."""
    html = functools.partial(gr.HTML, js_on_load=None)
    found = {"status": html(results.note(_START), elem_id="status", min_height=60)}
    with gr.Row(visible=False) as found["votes"]:
        found["vote_buttons"] = [
            (gr.Button(text, size="sm", elem_id=f"vote-{vote}"), vote)
            for vote, text in page.vote_texts.items()
        ]
    with gr.Row(elem_classes="takes"):
        found["slots"] = [html(visible=False) for _ in range(page.limits.takes)]
    found["comparison"] = gr.State(None, time_to_live=3600)
    found["api_text"] = gr.Textbox(visible=False, label="stage")
    found["api_files"] = gr.File(visible=False, file_count="multiple", label="files")
    gr.HTML(head=SCRIPT, js_on_load=None, visible=True)
    return found


def _connect(page, inputs: dict, outputs: dict) -> None:
    """What each button does."""
    private = {"api_visibility": "private"}
    buttons = [inputs["go"], inputs["cancel"]]
    working = lambda: (gr.update(interactive=False), gr.update(visible=True))
    waiting = lambda: (gr.update(interactive=True), gr.update(visible=False))
    status, slots = outputs["status"], outputs["slots"]
    names = ("video", "image", "prompt", "negative", "mode", "steps", "other", "guidance", "seed",
             "takes", "start", "seconds", "blind")  # fmt: skip
    begun = inputs["go"].click(working, None, buttons, queue=False, **private)
    made = begun.then(
        page.on_generate,
        [inputs[name] for name in names],
        [status, *slots, outputs["votes"], outputs["comparison"]],
        concurrency_id=page.device,
        concurrency_limit=1,
        show_progress_on=status,
        scroll_to_output=True,
        **private,
    )
    done = made.then(waiting, None, buttons, queue=False, **private)
    done.then(None, None, None, js=LOOK)
    cancelled = inputs["cancel"].click(
        page.on_cancel, None, status, queue=False, cancels=[made], **private
    )
    cancelled.then(waiting, None, buttons, queue=False, **private)
    for button, vote in outputs["vote_buttons"]:
        button.click(
            functools.partial(page.on_vote, vote),
            outputs["comparison"],
            [status, *slots[:2], outputs["votes"], outputs["comparison"]],
            queue=False,
            **private,
        )
    names = ("video", "image", "prompt", "negative", "steps", "guidance", "seed", "takes", "start",
             "seconds")  # fmt: skip
    gr.Button(visible=False).click(
        page.on_api,
        [inputs[name] for name in names],
        [outputs["api_text"], outputs["api_files"]],
        api_name="generate",
        concurrency_id=page.device,
        concurrency_limit=1,
    )
    if page.examples:
        inputs["examples"].click(
            lambda index: (*map(str, page.examples[index]), None),
            inputs["examples"],
            [inputs["video"], inputs["prompt"], inputs["image"]],
            queue=False,
            **private,
        )
    for mine, other in (("video", "image"), ("image", "video")):
        inputs[mine].upload(lambda: None, None, inputs[other], queue=False, **private)
