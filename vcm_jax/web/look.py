"""How the page looks: a theme with the system's fonts, style sheet and script."""

import gradio as gr

_FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")
_MONO = ("ui-monospace", "Menlo", "Consolas", "monospace")


def theme():
    """Nothing is loaded for it: fonts are the visitor's own."""
    return gr.themes.Default(
        primary_hue="blue", secondary_hue="blue", neutral_hue="slate", font=_FONT, font_mono=_MONO
    )


CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important }
.head h1 { font-size: 1.6rem; font-weight: 650; margin: 0 0 .15rem }
.head p { margin: 0 } .head .facts { font-size: .85rem; margin-top: .3rem;
                                    color: var(--body-text-color-subdued) }
.head, .head + *, #status, .takes .html-container, .html-container:has(.head, .status, .take) {
  padding: 0 !important }
#steps, #takes, #mode, #other { --checkbox-label-padding: 6px 9px; --checkbox-label-gap: 6px }
.status { padding: .75rem 1rem; border-radius: var(--radius-lg);
          background: var(--background-fill-secondary);
          border: 1px solid var(--border-color-primary) }
.status p { margin: 0 } .status.error { border-color: #dc2626; color: #b91c1c }
.dark .status.error { color: #fca5a5 }
.bar { height: 6px; margin-top: .6rem; border-radius: 3px; overflow: hidden;
       background: var(--border-color-primary) }
.bar span { display: block; height: 100%; background: var(--color-accent);
            transition: width .2s }
.takes { display: grid !important; gap: 1rem;
         grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)) }
.takes > * { min-width: 0 !important }
.take { border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg);
        padding: .8rem; background: var(--background-fill-primary) }
.take h3 { margin: 0; font-size: 1.05rem; font-weight: 600 }
.take .facts { margin: 0 0 .5rem; font-size: .85rem; color: var(--body-text-color-subdued);
               overflow-wrap: anywhere }
.take video { width: 100%; max-height: 340px; background: #000; border-radius: 6px;
              display: block; object-fit: contain }
.take audio { width: 100% }
.take .links { margin: .6rem 0 0; font-size: .9rem }
.take .links a { color: var(--link-text-color); text-decoration: underline; margin-right: .8rem;
                 white-space: nowrap }
.tracks { margin-top: .6rem; cursor: pointer }
.tracks .rows { position: relative }
.track { position: relative; margin: 0 0 2px; background: #fff; border-radius: 3px;
         overflow: hidden }
.track img { display: block; width: 100%; height: auto; margin: 0; pointer-events: none }
.track figcaption { position: absolute; left: 4px; top: 2px; font-size: 11px; line-height: 1.3;
                    padding: 0 4px; border-radius: 3px; background: rgba(255, 255, 255, .85);
                    color: #334155 }
.playhead { position: absolute; top: 0; bottom: 0; left: 0; width: 2px; background: #ef4444;
            display: none; pointer-events: none }
.ticks { position: relative; height: 1.2em; font-size: 11px;
         color: var(--body-text-color-subdued) }
.ticks span { position: absolute; border-left: 1px solid currentColor; padding-left: 3px;
              line-height: 1.2 }
footer { margin-top: 1rem }
"""

# Results that are not in view, as on a phone, are brought there.
LOOK = """() => {
  const take = document.querySelector('.take');
  if (take && take.getBoundingClientRect().top > 0.5 * window.innerHeight)
    document.querySelector('#status').scrollIntoView({behavior: 'smooth'});
}"""

# Players that play: one at a time, with a line that moves over the drawings below; a click on a
# drawing plays from there. Events of media do not bubble, so they are caught on their way down.
SCRIPT = """<script>
(() => {
  const player = (tracks) => tracks.closest('.take')?.querySelector('video, audio');
  const show = (media) => {
    const line = media.closest?.('.take')?.querySelector('.playhead');
    if (!line || !media.duration) return;
    line.style.display = 'block';
    line.style.left = `${100 * media.currentTime / media.duration}%`;
    if (!media.paused) requestAnimationFrame(() => show(media));
  };
  for (const kind of ['play', 'seeked', 'timeupdate'])
    document.addEventListener(kind, (event) => show(event.target), true);
  document.addEventListener('play', (event) => {
    for (const media of document.querySelectorAll('.take video, .take audio'))
      if (media !== event.target && event.target.closest?.('.take')) media.pause();
  }, true);
  document.addEventListener('click', (event) => {
    const tracks = event.target.closest?.('.tracks'), media = tracks && player(tracks);
    if (!media || !media.duration) return;
    const box = tracks.getBoundingClientRect();
    media.currentTime = media.duration * (event.clientX - box.left) / box.width;
    media.play();
  });
})();
</script>"""
