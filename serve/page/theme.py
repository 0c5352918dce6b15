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

.mm-bare h2, .mm-bare h3 { font-size: 14px; font-weight: 650; margin: 0; color: var(--body-text-color); }
.mm-title { font-size: 13px; font-weight: 650; margin: 0; }
.mm-about { font-size: 12.5px; margin: 2px 0 0; color: var(--body-text-color-subdued); }
.mm-buttons { gap: 8px !important; flex-wrap: nowrap !important; }
.mm-buttons button { min-width: 0 !important; padding: 8px 6px; white-space: nowrap; }
#mm-ask { flex: 2 1 0; }
.mm-chosen { background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: 8px; padding: 8px 10px; }
.mm-chosen h2 { margin-bottom: 6px; font-size: 13px; }
.mm-chosen figure { margin: 0; min-width: 0; }
.mm-chosen img { display: block; width: 100%; height: auto; border-radius: 4px; margin: 0 !important; }
.mm-chosen .mm-single img { width: auto; max-width: 100%; max-height: 150px; margin: 0 auto !important; }
.mm-chosen .mm-frames { grid-template-columns: repeat(4, 1fr); gap: 5px; }

.mm-stage { border: 0; padding: 0; margin: 0 0 10px; min-width: 0; }
.mm-stage legend { font-size: 12px; font-weight: 600; color: var(--body-text-color-subdued);
  padding: 0; margin-bottom: 4px; }
.mm-stage > div { display: flex; flex-wrap: wrap; gap: 5px; }
.mm-method { display: inline-flex; align-items: center; gap: 6px; padding: 3px 9px 3px 7px; border-radius: 6px;
  border: 1px solid var(--border-color-primary); font-size: 13px; line-height: 18px; cursor: pointer;
  color: var(--body-text-color); background: var(--background-fill-primary); }
.mm-method input { accent-color: #0f766e; margin: 0; width: 14px; height: 14px; }
.mm-method:has(input:checked) { border-color: var(--mm-accent); background: var(--mm-tint); }
.mm-method:has(input:focus-visible) { outline: 2px solid var(--mm-accent); outline-offset: 1px; }
.mm-unfit { cursor: not-allowed; border-style: dashed; color: var(--body-text-color-subdued);
  background: var(--background-fill-secondary); font-style: italic; }
.mm-unfit input { opacity: 0.5; cursor: not-allowed; }
.mm-why { font-size: 12px; margin: 4px 0 0; color: var(--body-text-color-subdued); }

.mm-line { display: flex; flex-wrap: wrap; justify-content: space-between; align-items: center; gap: 4px 16px;
  min-height: 24px; }
.mm-status { margin: 0; font-size: 14px; color: var(--body-text-color-subdued); }
.mm-dim { display: inline-flex; align-items: center; gap: 8px; font-size: 13px; color: var(--body-text-color-subdued); }
.mm-dim input { width: 120px; accent-color: #0f766e; }
.mm-savings { width: 100%; margin: 0 !important; border-collapse: collapse;
  outline: 1px solid var(--border-color-primary); border-radius: 6px;
  font-size: 13.5px; font-variant-numeric: tabular-nums;
  background: var(--block-background-fill); }
#mm-savings .mm-savings :is(tr, th, td) { border: 0 solid var(--border-color-primary) !important; }
#mm-savings .mm-savings :is(th, td) { text-align: right; padding: 5px 10px; border-bottom-width: 1px !important;
  color: var(--body-text-color); font-weight: 400; }
#mm-savings .mm-savings tr:last-child > * { border-bottom-width: 0 !important; }
#mm-savings .mm-savings thead th { color: var(--body-text-color-subdued); font-size: 12.5px; }
#mm-savings .mm-savings th:first-child { text-align: left; overflow-wrap: anywhere; }
#mm-savings .mm-savings tbody th { font-weight: 600; }
.mm-savings small { font-size: 12px; font-weight: 400; color: var(--body-text-color-subdued); }

.mm-cards { display: grid; gap: 12px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 250px), 1fr)); }
.mm-card { background: var(--block-background-fill); border: 1px solid var(--border-color-primary); border-radius: 8px;
  padding: 12px 14px; box-sizing: border-box; border-top: 3px solid var(--mm-accent); min-width: 0;
  display: flex; flex-direction: column; gap: 8px; }
.mm-card > * { margin: 0 !important; }
:root { --mm-accent: #0f766e; --mm-tint: #f0fdfa; }
.dark { --mm-accent: #2dd4bf; --mm-tint: #134e4a66; }
.mm-full { --mm-accent: #475569; }
.dark .mm-full { --mm-accent: #94a3b8; }
.mm-card header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 8px; }
.mm-card header h2 { overflow-wrap: anywhere; min-width: 0; }
.mm-card header span { font-size: 13px; color: var(--body-text-color-subdued); }
.mm-headline { margin-left: auto; font-size: 17px; font-weight: 650; font-variant-numeric: tabular-nums;
  color: var(--body-text-color); white-space: nowrap; }
.mm-answer { font-size: 18px; line-height: 1.45; color: var(--body-text-color); overflow-wrap: anywhere;
  white-space: pre-wrap; }
.mm-growing::after { content: "▍"; color: var(--mm-accent); }
.mm-card mark { color: inherit; background: none; padding: 0; }
.mm-card .mm-drafted { background: #ccfbf1; border-radius: 2px; }
.dark .mm-card .mm-drafted { background: #134e4a; }
.mm-card .mm-differs { text-decoration: underline wavy #c2410c 1.5px; text-underline-offset: 4px; }
.dark .mm-card .mm-differs { text-decoration-color: #fb923c; }
.mm-expected, .mm-note, .mm-facts { font-size: 13px; line-height: 1.45; color: var(--body-text-color-subdued); }
.mm-facts { display: flex; flex-wrap: wrap; gap: 0 14px; }
.mm-facts b, .mm-meter b { color: var(--body-text-color); font-weight: 650; }
.mm-turn { border-left: 2px solid var(--border-color-primary); padding-left: 9px; font-size: 14px; }
.mm-turn p { margin: 0; color: var(--body-text-color); }
.mm-turn .mm-asked { color: var(--body-text-color-subdued); }
.mm-meter { font-size: 13px; color: var(--body-text-color-subdued); }
.mm-meter b { font-size: 17px; }
.mm-track { height: 6px; border-radius: 3px; background: var(--border-color-primary); margin-top: 4px; }
.mm-track i { display: block; height: 100%; border-radius: 3px; background: var(--mm-accent); }
.mm-bars { font-size: 13px; color: var(--body-text-color); display: grid; gap: 3px; }
.mm-bars > div { display: grid; grid-template-columns: 54px 1fr 62px; align-items: center; gap: 8px; }
.mm-bars dt { color: var(--body-text-color-subdued); }
.mm-bars dd { margin: 0; }
.mm-ms { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.mm-bar { height: 10px; }
.mm-bar i { display: block; height: 100%; min-width: 1px; border-radius: 2px; background: var(--mm-accent); }

.mm-wait { color: var(--body-text-color-subdued); font-size: 14px; }
.mm-busy::after { content: ""; display: inline-block; width: 12px; height: 12px; margin-left: 8px;
  border: 2px solid var(--border-color-primary); border-top-color: var(--mm-accent); border-radius: 50%;
  vertical-align: -2px; animation: mm-turn 0.9s linear infinite; }
@keyframes mm-turn { to { transform: rotate(360deg); } }
@media (prefers-reduced-motion: reduce) { .mm-busy::after { animation: none; } }
.mm-error { background: #fef2f2; color: #7f1d1d; border: 1px solid #fca5a5; border-radius: 6px; padding: 10px 12px;
  font-size: 14px; overflow-wrap: anywhere; }
.mm-error small { display: block; margin-top: 4px; font-size: 12.5px; color: inherit; }
.mm-error ul { margin: 4px 0 0; padding-left: 18px; }
.dark .mm-error { background: #450a0a; color: #fecaca; border-color: #7f1d1d; }

.mm-frames { display: grid; gap: 6px; grid-template-columns: repeat(4, minmax(0, 1fr)); }
.mm-map figure { margin: 0; min-width: 0; }
.mm-map figcaption, .mm-chosen figcaption { font-size: 11.5px; line-height: 1.3; color: var(--body-text-color-subdued);
  margin-top: 2px; font-variant-numeric: tabular-nums; }
.mm-pic { position: relative; border-radius: 4px; overflow: hidden; background-size: 100% 100%; width: 100%; }
.mm-single .mm-pic { max-width: 420px; }
.mm-pic svg { position: absolute; inset: 0; width: 100%; height: 100%; pointer-events: none; }
.mm-pic .mm-dropped { fill: #0f172a; fill-opacity: var(--mm-dim, 0.78); }
.mm-pic .mm-border { fill: none; stroke: #2dd4bf; stroke-width: 1.25px; vector-effect: non-scaling-stroke; }
.mm-timeline { position: relative; height: 20px; background: var(--background-fill-secondary); border-radius: 3px; }
.mm-timeline i { position: absolute; top: 0; bottom: 0; box-sizing: border-box; border-left: 2px solid #0d9488;
  padding-left: 3px; overflow: hidden; font-size: 11px; line-height: 20px; font-style: normal; background: #ccfbf1;
  color: #134e4a; }
.mm-timeline i:nth-child(even) { background: #99f6e4; }
.mm-shares { height: 28px; }
.mm-timeline.mm-shares i { border: 0; padding: 0 1px; background: none; }
.mm-shares b { position: absolute; left: 1px; right: 1px; bottom: 0; background: var(--mm-accent);
  border-radius: 2px 2px 0 0; }
.mm-ends { display: flex; justify-content: space-between; font-size: 11.5px; color: var(--body-text-color-subdued); }
.mm-code { font-size: 13px; color: var(--body-text-color); }
.mm-code summary { cursor: pointer; color: var(--body-text-color-subdued); }
.mm-snippet { display: grid; grid-template-columns: 1fr auto; align-items: center; gap: 4px; margin-top: 8px; }
.mm-snippet h3 { font-size: 13px; margin: 0; }
.mm-snippet button { font-size: 12.5px; padding: 2px 10px; border-radius: 5px; cursor: pointer;
  border: 1px solid var(--border-color-primary); background: var(--background-fill-secondary);
  color: var(--body-text-color); }
.mm-snippet pre { grid-column: 1 / -1; margin: 0; max-height: 180px; overflow: auto; font: 11.5px/1.45 var(--font-mono);
  padding: 8px; border-radius: 5px; background: var(--background-fill-secondary); color: var(--body-text-color); }
footer { display: none !important; }
@media (max-width: 700px) {
  .mm-page { flex-direction: column !important; }
  .mm-answer { font-size: 17px; }
  #mm-savings .mm-savings :is(th, td) { padding: 5px; }
  .mm-savings { font-size: 12.5px; }
}
"""
