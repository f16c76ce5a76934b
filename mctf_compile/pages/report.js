"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const slider = at("r");
  if (!slider) return;

  const known = (number) => (number === null ? "?" : String(number));
  const macs = (number) => (number === null ? "?" : (number / data.divisor).toFixed(data.digits));

  // The same points as in the first state: see shape in report_page.py.
  function shape(into, out, widest) {
    if (into === null || out === null) return "";
    const a = (50 * into) / widest, b = (50 * out) / widest;
    const corners = [[50 - a, 0], [50 + a, 0], [50 + a, 9], [50 + b, 13], [50 + b, 20], [50 - b, 20], [50 - b, 13], [50 - a, 9]];
    return corners.map(([x, y]) => x.toFixed(2) + "," + y).join(" ");
  }

  function show([r, total, removed, blocks]) {
    const reported = r === null;
    const place = reported ? data.chosen : data.points.findIndex((point) => point[0] === r);
    const fewer = (data.dense / Math.max(total, 1)).toFixed(2);
    slider.value = place;
    at("r-shown").textContent = reported && !same ? "as in the report" : "r = " + data.points[place][0];
    slider.setAttribute("aria-valuetext", at("r-shown").textContent);
    at("at-r").textContent = `${macs(total)} ${data.unit}, ${fewer}× fewer, ${removed} tokens removed`;
    const most = Math.max(data.points[data.points.length - 1][0], 1);
    at("marker").setAttribute("cx", ((100 * data.points[place][0]) / most).toFixed(2) + "%");
    at("marker").setAttribute("cy", (100 - (100 * total) / data.dense).toFixed(2) + "%");
    let inBlocks = 0;
    blocks.forEach(([into, out, work, said, fuses], i) => {
      const state = fuses ? "fused" : "dense";
      at("shape-" + i).setAttribute("points", shape(into, out, data.widest[i]));
      at("shape-" + i).setAttribute("class", state);
      at("out-" + i).textContent = known(out);
      at("block-" + i).className = state;
      at("tokens-" + i).textContent = known(into) + " → " + known(out);
      at("macs-" + i).textContent = macs(work);
      at("macs-bar-" + i).setAttribute("width", (100 * (work || 0)) / data.mostMacs + "%");
      at("remark-" + i).textContent = data.said[said];
      inBlocks += work || 0;
    });
    if (blocks.length) {
      at("macs-rest").textContent = macs(total - inBlocks);
      at("macs-all").textContent = macs(total);
    }
    const elsewhere = !reported;
    at("elsewhere").hidden = !elsewhere;
    at("back").hidden = !elsewhere;
    document.body.classList.toggle("stale", elsewhere);
  }

  // Whether the report is what the slider gives at one of its places.
  const tokens = (state) => JSON.stringify(state[3].map((block) => [block[0], block[1], block[3]]));
  const same = tokens(data.report) === tokens(data.points[data.chosen]);

  function moved(place) {
    const own = same && place === data.chosen;
    show(own ? data.report : data.points[place]);
    history.replaceState(null, "", own ? location.pathname + location.search : "#r=" + data.points[place][0]);
  }

  // The end of the address may name an r, of which the nearest that was counted is shown.
  function fromAddress() {
    const found = /^#r=(\d+)$/.exec(location.hash);
    if (!found) return show(data.report);
    const wanted = Number(found[1]);
    const distance = (i) => Math.abs(data.points[i][0] - wanted);
    const place = data.points.reduce((best, _, i) => (distance(i) < distance(best) ? i : best), 0);
    show(same && place === data.chosen ? data.report : data.points[place]);
  }

  slider.addEventListener("input", () => moved(Number(slider.value)));
  at("back").addEventListener("click", () => {
    history.replaceState(null, "", location.pathname + location.search);
    show(data.report);
    slider.focus();
  });
  window.addEventListener("hashchange", fromAddress);
  at("control").hidden = false;
  fromAddress();
})();
