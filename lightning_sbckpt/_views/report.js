"use strict";
(() => {
  const table = document.getElementById("checkpoints");
  if (!table) return;
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const text = new Intl.Collator(undefined, { numeric: true });

  // What has no value stands below everything that has one, whichever way the others go.
  const compare = (column, sign) => (first, second) => {
    const [a, b] = [first.cells[column].dataset.v, second.cells[column].dataset.v];
    if (a !== undefined || b !== undefined) {
      const [x, y] = [parseFloat(a), parseFloat(b)];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return x < y ? -sign : x > y ? sign : 0;
    }
    const [s, t] = [first.cells[column].textContent, second.cells[column].textContent];
    if (!s || !t) return !s - !t;
    return sign * text.compare(s, t);
  };

  const sort = (column, sign) => {
    heads.forEach((head, place) => {
      const way = place !== column ? "none" : sign > 0 ? "ascending" : "descending";
      head.setAttribute("aria-sort", way);
    });
    body.append(...rows.sort(compare(column, sign)));
  };

  const nameOf = (head) => head.textContent.trim();

  // report.html#sort=val_loss opens sorted, #sort=-val_loss the other way round.
  const sortAsAsked = () => {
    let asked = "";
    try {
      asked = decodeURIComponent(location.hash);
    } catch {
      return;
    }
    if (!asked.startsWith("#sort=")) return;
    asked = asked.slice(6);
    let column = heads.findIndex((head) => nameOf(head) === asked);
    let sign = 1;
    if (column < 0 && asked.startsWith("-")) {
      column = heads.findIndex((head) => nameOf(head) === asked.slice(1));
      sign = -1;
    }
    if (column >= 0) sort(column, sign);
  };

  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      sort(column, sign);
      const asked = encodeURIComponent((sign < 0 ? "-" : "") + nameOf(head));
      history.replaceState(null, "", "#sort=" + asked);
    });
  });

  const onlyThere = document.getElementById("only-there");
  onlyThere.addEventListener("change", () => {
    table.classList.toggle("only-there", onlyThere.checked);
  });

  addEventListener("hashchange", sortAsAsked);
  sortAsAsked();
})();
