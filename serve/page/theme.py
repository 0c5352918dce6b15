"""How the page looks. System fonts only: nothing here is fetched from anywhere."""

from __future__ import annotations

from gradio.themes import Base

SANS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Liberation Mono", "monospace")


def theme() -> Base:
    return Base(
        primary_hue="teal",
        neutral_hue="slate",
        radius_size="md",
        spacing_size="sm",
        text_size="md",
        font=SANS,
        font_mono=MONO,
    ).set(
        body_background_fill="*neutral_50",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_600",
        block_label_text_color_dark="*neutral_300",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
        block_border_width="1px",
        block_label_background_fill="transparent",
        block_label_border_width="0px",
        block_title_text_weight="600",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
    )


CSS = """
gradio-app, .gradio-container { min-width: 0 !important; }
.gradio-container { max-width: 1360px !important; margin: 0 auto; padding: 14px clamp(6px, 1.4vw, 18px) !important; }
.gradio-container .app { padding: clamp(4px, 2vw, 28px) !important; }
.mm-bare, .mm-bare .html-container { padding: 0 !important; border: 0 !important; background: none !important; }
.mm-head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 14px; padding: 0 2px; }
.mm-head h1 { font-size: 20px; font-weight: 700; margin: 0; }
.mm-head p { margin: 0; color: var(--body-text-color-subdued); font-size: 14px; flex: 1 1 auto; }
.mm-server { font-size: 13px; color: var(--body-text-color-subdued); }
.mm-server::before { content: ""; display: inline-block; width: 8px; height: 8px; border-radius: 50%;
  background: #0d9488; margin-right: 6px; }
.mm-limits { font-size: 13px; color: var(--body-text-color); margin: 0; max-width: 60rem; }
.mm-server.mm-down::before { background: #dc2626; }
.mm-server code, .mm-card code { font-family: var(--font-mono); font-size: 12px; }

.mm-samples, .mm-samples .grid-wrap { min-height: 0 !important; height: auto !important; max-height: none !important; }
.mm-samples .grid-wrap { padding: 6px !important; overflow: visible !important; }
.mm-samples .grid-container { gap: 6px !important; padding: 0 !important; margin: 0 !important; width: 100%;
  box-sizing: border-box; grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important;
  grid-auto-rows: auto !important; height: auto !important; }
.mm-samples .thumbnail-item { aspect-ratio: 1; }
.mm-samples .caption-label { display: none; }

.mm-card { background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: 8px; padding: 14px 16px; min-height: 120px; height: 100%; box-sizing: border-box;
  border-top: 3px solid var(--mm-accent); }
.mm-answers .mm-bare, .mm-answers .html-container { display: flex; flex-direction: column; }
.mm-answers .html-container, .mm-answers .prose, .mm-answers .mm-card { flex: 1 1 auto; height: auto; }
.mm-card.mm-full { --mm-accent: #64748b; }
.mm-card.mm-reduced { --mm-accent: #0d9488; }
.mm-card h2 { font-size: 13px; font-weight: 600; margin: 0 0 8px; display: flex; justify-content: space-between;
  gap: 8px; color: var(--body-text-color); }
.mm-card h2 span { font-weight: 400; color: var(--body-text-color-subdued); text-align: right;
  overflow-wrap: anywhere; }
.mm-answer { font-size: 19px; line-height: 1.4; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 4px;
  color: var(--body-text-color); max-height: 320px; overflow-y: auto; }
.mm-drafted { background: #ccfbf1; color: #134e4a; border-radius: 3px; padding: 0 1px;
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.dark .mm-drafted { background: #134e4a; color: #ccfbf1; }
.mm-expected { font-size: 13px; margin: 0 0 4px; color: var(--body-text-color-subdued); }
.mm-note { font-size: 12.5px; color: var(--body-text-color-subdued); margin: 8px 0 0; }
.mm-meter { margin: 12px 0 0; }
.mm-meter b { font-size: 17px; }
.mm-meter span { font-size: 13px; color: var(--body-text-color-subdued); }
.mm-track { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden;
  margin-top: 4px; }
.mm-track i { display: block; height: 100%; background: var(--mm-accent); }
.mm-bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: 4px 10px; align-items: center;
  margin: 12px 0 0; font-size: 13px; }
.mm-bars dt { color: var(--body-text-color-subdued); }
.mm-bars dd { margin: 0; }
.mm-bars .mm-ms { text-align: right; font-variant-numeric: tabular-nums; }
.mm-bar { height: 11px; }
.mm-bar i { display: block; height: 100%; min-width: 1px; border-radius: 2px; background: var(--mm-accent); }
.mm-bars .mm-total { font-weight: 600; color: var(--body-text-color); }

.mm-wait { color: var(--body-text-color-subdued); }
.mm-wait p { margin: 0; font-size: 14px; }
.mm-wait.mm-busy p::after { content: ""; display: inline-block; width: 12px; height: 12px; margin-left: 8px;
  border: 2px solid var(--border-color-primary); border-top-color: var(--mm-accent); border-radius: 50%;
  vertical-align: -2px; animation: mm-turn 0.9s linear infinite; }
@keyframes mm-turn { to { transform: rotate(360deg); } }
@media (prefers-reduced-motion: reduce) { .mm-wait.mm-busy p::after { animation: none; } }
.mm-error { background: #fef2f2; color: #7f1d1d; border: 1px solid #fca5a5; border-radius: 6px; padding: 10px 12px;
  font-size: 14px; overflow-wrap: anywhere; }
.mm-error small { display: block; margin-top: 4px; font-size: 12.5px; opacity: 0.85; }
.dark .mm-error { background: #450a0a; color: #fecaca; border-color: #7f1d1d; }
.mm-sum { display: flex; flex-wrap: wrap; gap: 4px 22px; font-size: 14px; padding: 2px 2px 0;
  color: var(--body-text-color); }
.mm-sum b { font-weight: 650; }

.mm-figs { background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: 8px; padding: 12px 14px; }
.mm-figs header { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: center; gap: 6px 16px;
  margin-bottom: 10px; font-size: 13px; }
.mm-figs h2 { font-size: 13px; font-weight: 600; margin: 0; color: var(--body-text-color); }
.mm-figs label { display: inline-flex; align-items: center; gap: 8px; color: var(--body-text-color-subdued); }
.mm-figs input[type=range] { width: 130px; accent-color: #0d9488; }
.mm-frames { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
.mm-timeline { position: relative; height: 20px; margin: 12px 0 0; }
.mm-timeline i { position: absolute; top: 0; bottom: 0; box-sizing: border-box; border-left: 2px solid #0d9488;
  padding-left: 3px; overflow: hidden; font: 11px/20px inherit; font-style: normal; background: #ccfbf1;
  color: #134e4a; }
.mm-timeline i:nth-child(even) { background: #99f6e4; }
.mm-single { display: flex; justify-content: center; }
.mm-figs figure { margin: 0; min-width: 0; }
.mm-figs figcaption { font-size: 12px; color: var(--body-text-color-subdued); margin-top: 3px;
  font-variant-numeric: tabular-nums; }
.mm-pic { position: relative; line-height: 0; border-radius: 4px; overflow: hidden; }
.mm-frames .mm-pic img { width: 100%; height: auto; }
.mm-single { --mm-height: 360px; }
.mm-single figure { width: min(100%, calc(var(--mm-height) * var(--mm-ratio))); }
.mm-single .mm-pic img { width: 100%; height: auto; }
.mm-pic img { margin: 0 !important; }
.mm-pic svg { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none; }
.mm-pic .mm-dropped { fill: #0f172a; fill-opacity: var(--mm-dim, 0.78); }
.mm-pic .mm-border { fill: none; stroke: #2dd4bf; stroke-width: 1.25px; vector-effect: non-scaling-stroke; }
.mm-side .mm-figs { padding: 8px 10px; }
.mm-side .mm-figs header { margin-bottom: 6px; }
.mm-side .mm-single { --mm-height: 150px; }
.mm-side .mm-frames { grid-template-columns: repeat(4, 1fr); gap: 5px; }
.mm-side .mm-frames figcaption { font-size: 11px; }
footer { display: none !important; }
@media (max-width: 700px) {
  .mm-answers { flex-direction: column !important; }
  .mm-answers > * { min-width: 0 !important; width: 100%; }
  .mm-card { height: auto; }
  .mm-frames { grid-template-columns: repeat(2, 1fr); }
  .mm-answer { font-size: 17px; }
}
"""
